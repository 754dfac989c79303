"""What is learnt from real stages in a minute, each with a twin that must learn nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmctl.registry import get_registry
from llmctl.stage import Artifact
from llmctl.testing import StageResult, run_stage

pytestmark = pytest.mark.slow
QUIET = {"save_every": 0, "threads": 1}


def stage(name: str, directory: Path, params: dict[str, Any], **inputs: Any) -> StageResult:
    return run_stage(get_registry().stages[name], directory, params, **inputs)


def test_masks_are_filled_twice_as_often_as_by_the_most_frequent_token(tmp_path: Path) -> None:
    text = stage("data", tmp_path / "data", {"reader": "python-stdlib", "emit": ["text"]}).outputs["text"]
    tokens = stage("tokenize", tmp_path / "tokenize", {"vocab_size": 2048, "special": "roberta"}, text=text).outputs
    shape = {"preset": "roberta", "dim": 128, "layers": 2, "heads": 4, "context": 64}
    params = {**shape, "max_steps": 200, "batch_size": 32, "embedding_lr": 0.005, "eval_batches": 8, **QUIET}
    given = {"tokens": tokens["tokens"], "tokenizer": tokens["tokenizer"]}
    found = stage("train-pretrain", tmp_path / "train", params, **given).metrics
    print("masked accuracy", found["accuracy.validation"], "unigram", found["unigram_accuracy.validation"])
    assert found["accuracy.validation"] > 2 * found["unigram_accuracy.validation"]
    assert found["loss.validation"] < found["unigram_loss.validation"] - 0.3


def translated(tmp_path: Path, twin: str, measured: Artifact | None = None) -> tuple[float, Artifact]:
    """BLEU on held-out pairs, and the pairs, after training on those of `twin`."""
    base = tmp_path / twin
    made = stage("data", base / "data", {"reader": "toy-translation", "rows": 4000, "seed": 1, "negative_twin": twin})
    special = {"vocab_size": 600, "special": "t5", "sentinels": 16}
    tokens = stage("tokenize", base / "tokenize", special, text=made.outputs["text"]).outputs
    shape = {"preset": "t5", "dim": 128, "layers": 2, "heads": 8, "ff_dim": 256, "context": 64}
    params = {**shape, "max_steps": 20, "batch_size": 64, "embedding_lr": 0.01, **QUIET}
    given = {"tokens": tokens["tokens"], "tokenizer": tokens["tokenizer"]}
    model = stage("train-pretrain", base / "train", params, **given).outputs["model"]
    params = {"max_steps": 130, "batch_size": 64, "lr": 0.01, "embedding_lr": 0.02, "warmup_steps": 10, **QUIET}
    data = made.outputs["labelled"]
    tuned = stage("sft", base / "sft", {**params, "schedule": "wsd"}, model=model, data=data).outputs["model"]
    values = {"limit": 150, "max_new_tokens": 24, "threads": 1}
    found = stage("eval", base / "eval", values, model=tuned, data=[measured or data])
    return found.metrics["seq2seq.bleu"], data


def test_a_toy_language_is_translated_and_not_from_shuffled_pairs(tmp_path: Path) -> None:
    right, data = translated(tmp_path, "none")
    wrong, _ = translated(tmp_path, "shuffled-labels", data)
    print("BLEU", right, "from shuffled pairs", wrong)
    assert right > 90
    assert wrong < 10


def summed_up(tmp_path: Path, twin: str, measured: Artifact | None = None) -> tuple[dict[str, float], Artifact]:
    """What the summaries of held-out texts score after training on those of `twin`, and the texts."""
    base = tmp_path / twin
    made = stage("data", base / "data", {"reader": "toy-summary", "rows": 4000, "seed": 1, "negative_twin": twin})
    special = {"vocab_size": 440, "special": "t5", "sentinels": 16}
    tokens = stage("tokenize", base / "tokenize", special, text=made.outputs["text"]).outputs
    shape = {"preset": "t5", "dim": 128, "layers": 2, "heads": 8, "ff_dim": 256, "context": 96}
    params = {**shape, "max_steps": 20, "batch_size": 64, "embedding_lr": 0.01, **QUIET}
    given = {"tokens": tokens["tokens"], "tokenizer": tokens["tokenizer"]}
    model = stage("train-pretrain", base / "train", params, **given).outputs["model"]
    params = {"max_steps": 150, "batch_size": 64, "lr": 0.01, "embedding_lr": 0.02, "warmup_steps": 10, **QUIET}
    data = made.outputs["labelled"]
    tuned = stage("sft", base / "sft", {**params, "schedule": "wsd"}, model=model, data=data).outputs["model"]
    values = {"limit": 120, "max_new_tokens": 16, "threads": 1, "baselines": ["lead-sentence"]}
    return stage("eval", base / "eval", values, model=tuned, data=[measured or data]).metrics, data


@pytest.mark.timeout(900)  # two trainings of 75 s on two free cores
def test_toy_summaries_beat_the_first_sentence_and_not_from_shuffled_pairs(tmp_path: Path) -> None:
    right, data = summed_up(tmp_path, "none")
    wrong, _ = summed_up(tmp_path, "shuffled-labels", data)
    lead = right["seq2seq.rouge_l_lead"]
    print("ROUGE-L", right["seq2seq.rouge_l"], "first sentence", lead, "from shuffled", wrong["seq2seq.rouge_l"])
    assert right["seq2seq.rouge_l_low"] > 0.9 > lead + 0.3
    assert wrong["seq2seq.rouge_l"] < lead


def sentiment(tmp_path: Path, twin: str) -> float:
    base = tmp_path / twin
    params = {"reader": "toy-sentiment", "rows": 2000, "negative_twin": twin}
    made = stage("data", base / "data", params).outputs
    tokens = stage("tokenize", base / "tokenize", {"vocab_size": 400, "special": "bert"}, text=made["text"]).outputs
    shape = {"preset": "bert", "dim": 64, "layers": 2, "heads": 4, "context": 48, "objective": "mlm"}
    given = {"tokens": tokens["tokens"], "tokenizer": tokens["tokenizer"]}
    params = {**shape, "max_steps": 60, "batch_size": 32, "embedding_lr": 0.005, **QUIET}
    model = stage("train-pretrain", base / "train", params, **given).outputs["model"]
    params = {"max_steps": 100, "batch_size": 32, "lr": 0.01, "embedding_lr": 0.005, **QUIET}
    tuned = stage("sft", base / "sft", params, model=model, data=made["labelled"]).outputs["model"]
    found = stage("eval", base / "eval", {"threads": 1}, model=tuned, data=[made["labelled"]])
    return float(found.metrics["classification.value"])


def test_planted_sentiment_is_found_and_not_from_shuffled_labels(tmp_path: Path) -> None:
    right, wrong = sentiment(tmp_path, "none"), sentiment(tmp_path, "shuffled-labels")
    print("sentiment", right, "from shuffled labels", wrong)
    assert right >= 0.95
    assert 0.3 < wrong < 0.7
