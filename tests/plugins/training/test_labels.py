"""`sft` and `eval` on labelled rows, from a pre-trained encoder or encoder-decoder to measured answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.errors import InputError, StageError, TempFail, UsageError
from llmctl.nn.hf import load_model
from llmctl.registry import get_registry
from llmctl.stage import Artifact
from llmctl.testing import StageResult, run_stage
from llmctl.text.pooling import read_pooling, write_pooling
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.reading import open_reader

from .conftest import COLOUR_OF, THINGS, World, write

FAST = {"max_steps": 12, "batch_size": 4, "save_every": 5, "log_every": 4, "warmup_steps": 2, "threads": 1}
SHAPE = {"dim": 32, "layers": 2, "heads": 4, "ff_dim": 64, "context": 48}
TASKS = ["classification", "token-classification", "question-answering", "embedding", "seq2seq"]


def rows_of(task: str) -> list[dict[str, Any]]:
    """The tiny world as labelled rows."""
    found = []
    for thing, colour in COLOUR_OF.items():
        text = f"The {thing} is {colour}."
        found.append(
            {
                "classification": {"text": text, "label": colour},
                "token-classification": {
                    "tokens": ["The", thing, "is", colour],
                    "labels": ["O", "B-THING", "O", "B-COLOUR"],
                },
                "question-answering": {"context": text, "question": f"Which {thing}?", "answer": colour},
                "embedding": {"text": f"the {thing}", "positive": f"a {colour} {thing}"},
                "seq2seq": {"source": f"{thing} is {colour}", "target": f"it is the {colour} {thing}"},
            }[task]
        )
    return found


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, world: World) -> dict[str, Artifact]:
    """A pre-trained BERT, RoBERTa and T5, hardly trained at all."""
    base, stages = tmp_path_factory.mktemp("bases"), get_registry().stages
    made = {}
    for special in ("bert", "roberta", "t5"):
        params = {"vocab_size": 300, "special": special, **({"sentinels": 12} if special == "t5" else {})}
        tokens = run_stage(stages["tokenize"], base / special, params, text=world.text).outputs
        values = {"preset": special, **SHAPE, **FAST, "max_steps": 2}
        given = {"tokens": tokens["tokens"], "tokenizer": tokens["tokenizer"]}
        made[special] = run_stage(stages["train-pretrain"], base / f"{special}-model", values, **given).outputs["model"]
    return made


@pytest.fixture
def data_of(tmp_path: Path) -> Callable[..., Artifact]:
    def make(task: str, rows: list[dict[str, Any]] | None = None, name: str = "data") -> Artifact:
        found = rows_of(task) if rows is None else rows
        return write(tmp_path / name, "dataset.labelled", {"train": found, "validation": found[:6]})

    return make


@pytest.fixture
def tune(tmp_path: Path, bases: dict[str, Artifact]) -> Callable[..., StageResult]:
    def run(base: str | Artifact, data: Artifact, name: str = "sft", stop: int | None = None, **params: Any):
        model = bases[base] if isinstance(base, str) else base
        stage = get_registry().stages["sft"]
        return run_stage(stage, tmp_path / name, {**FAST, **params}, stop, model=model, data=data)

    return run


def measure(tmp_path: Path, model: Artifact, data: Artifact, **params: Any) -> StageResult:
    values = {"threads": 1, "max_new_tokens": 16, "resamples": 200, **params}
    return run_stage(get_registry().stages["eval"], tmp_path / "eval", values, model=model, data=[data])


def base_of(task: str) -> str:
    return "t5" if task == "seq2seq" else "bert"


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_learnt_and_measured(tune, data_of, tmp_path: Path, task: str) -> None:
    data = data_of(task)
    made = tune(base_of(task), data, max_steps=120, batch_size=8, embedding_lr=0.01)
    assert made.metrics["task"] == task
    assert made.metrics["accuracy.validation"] > 0.8, made.metrics
    found = measure(tmp_path, made.outputs["model"], data)
    name = task.replace("-", "_")
    assert found.metrics[f"{name}.value"] > 0.6 and found.metrics[f"{name}.n"] == 6
    further = {
        "classification": "classification.f1",
        "token-classification": "token_classification.f1",
        "question-answering": "question_answering.f1",
        "embedding": "embedding.mrr",
        "seq2seq": "seq2seq.bleu",
    }[task]
    assert found.metrics[further] > (60 if task == "seq2seq" else 0.6)
    assert found.metrics["backend"].startswith("torch cpu")
    # The seam: what training counts as right on these rows is what evaluation counts.
    if task == "classification":
        assert found.metrics["classification.value"] == pytest.approx(made.metrics["accuracy.validation"])


CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "embedding": "AutoModel",
}


@pytest.mark.parametrize("base", ["bert", "roberta"])
@pytest.mark.parametrize("task", CLASSES)
def test_transformers_loads_the_head_and_says_the_same(tune, data_of, base: str, task: str) -> None:
    import transformers

    path = tune(base, data_of(task), max_steps=2).outputs["model"].path
    peer, found = getattr(transformers, CLASSES[task]).from_pretrained(path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    labels = load_model(path).config.labels
    if "classification" in task:
        assert peer.config.id2label == dict(enumerate(labels)) and len(labels) > 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts, pairs = ["a kite", "the blue engine"], ["red", "is it?"]
    given = tokenizer(texts, pairs, padding=True, return_tensors="pt", return_token_type_ids=base == "bert")
    with torch.no_grad():
        theirs = peer.eval()(**given)
    framed = [Tokenizer.load(path).frame(*one) for one in zip(texts, pairs, strict=True)]
    segments = [one.segments for one in framed] if base == "bert" else None
    mine = open_reader(path, "cpu").run([one.ids for one in framed], segments)
    for name, value in mine.items():
        if task == "classification":
            assert np.abs(value - theirs[name].numpy()).max() < 1e-5
            continue
        for number, one in enumerate(framed):
            size = len(one.ids)
            assert np.abs(value[number, :size] - theirs[name][number, :size].numpy()).max() < 1e-5


def test_resume_is_bit_identical(tune, data_of, weights) -> None:
    data = data_of("question-answering")
    straight = tune("bert", data, "straight")
    with pytest.raises(TempFail):
        tune("bert", data, "stopped", stop=7)
    assert weights(tune("bert", data, "stopped")) == weights(straight)


def test_pooling_is_written_for_those_who_embed(tune, data_of, tmp_path: Path) -> None:
    data = data_of("embedding")
    for pooling in ("mean", "cls"):
        made = tune("roberta", data, pooling, pooling=pooling)
        assert read_pooling(made.outputs["model"].path) == pooling
    assert read_pooling(tmp_path) == "mean"
    write_pooling(tmp_path, "mean", 8, 16)
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(path.read_text().replace("mean_tokens", "max_tokens"))
    with pytest.raises(InputError, match="pooling_mode_max_tokens"):
        read_pooling(tmp_path)
    write_pooling(tmp_path, "cls", 8, 16)
    listed = (tmp_path / "modules.json").read_text()
    (tmp_path / "modules.json").write_text(listed.replace("Normalize", "Dense"))
    with pytest.raises(InputError, match="asks for a module Dense"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text(listed.replace('"1_Pooling"', '"2_Pooling"'))
    with pytest.raises(InputError, match="has its Pooling in '2_Pooling'"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text(listed)
    for config, found in (
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"], "x": 1}, "cls"),
    ):
        path.write_text(json.dumps(config))
        assert read_pooling(tmp_path) == found
    for config in ({"pooling_mode": "lasttoken"}, {"pooling_mode": ["cls", "mean"]}, {}):
        path.write_text(json.dumps(config))
        with pytest.raises(InputError, match="asks for"):
            read_pooling(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="is missing, though modules.json names it"):
        read_pooling(tmp_path)
    hot, cold = (tune("roberta", data, f"t{t}", temperature=t).metrics["loss.train"] for t in (1.0, 0.05))
    assert hot != cold


@pytest.mark.parametrize(
    ("base", "task", "params", "message"),
    [
        ("t5", "classification", {}, "task classification needs an encoder or a decoder, t5 is an encoder-decoder"),
        ("bert", "seq2seq", {}, "task seq2seq needs an encoder-decoder, bert is an encoder"),
        ("bert", "classification", {"task": "embedding"}, "task embedding was asked for"),
        ("bert", "classification", {"pooling": "cls"}, "pooling belongs to task embedding"),
        ("bert", "classification", {"probe_tokens": 3}, "probe_tokens belongs to task chat"),
        ("bert", "embedding", {"micro_batch": 2}, "micro_batch cannot be set"),
        ("bert", "embedding", {"parallel": {"dp_replicate": 2}}, "data parallelism cannot be set"),
    ],
)
def test_contradictions_are_usage_errors(tune, data_of, base, task, params, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tune(base, data_of(task), **params)
    assert caught.value.hint


def test_conversations_need_a_decoder(tune, world: World) -> None:
    with pytest.raises(UsageError, match="conversations need a decoder, bert is an encoder"):
        tune("bert", world.chat)


def test_a_decoder_classifies_from_its_last_token(tune, data_of, world: World, tmp_path: Path) -> None:
    made = tune(world.model, data_of("classification"), max_steps=120, batch_size=8, embedding_lr=0.01)
    assert load_model(made.outputs["model"].path).config.head == "classification"
    assert made.metrics["accuracy.validation"] > 0.8
    assert measure(tmp_path, made.outputs["model"], data_of("classification")).metrics["classification.value"] > 0.8
    with pytest.raises(UsageError, match="question-answering needs an encoder, llama is a decoder"):
        tune(world.model, data_of("question-answering", name="asked"))


def test_bad_labels_are_named(tune, data_of, tmp_path: Path) -> None:
    rows = rows_of("classification")
    one = [{**row, "label": "red"} for row in rows]
    with pytest.raises(InputError, match="has 1 label"):
        tune("bert", data_of("classification", one, "one"))
    odd = write(tmp_path / "odd", "dataset.labelled", {"train": rows, "validation": [{"text": "a", "label": "purple"}]})
    with pytest.raises(InputError, match="label 'purple', which no training row has"):
        tune("bert", odd)


def test_rows_that_do_not_fit_are_dropped_and_counted(tune, data_of) -> None:
    rows = rows_of("classification")
    long = [*rows, {"text": "x " * 80, "label": "red"}]
    made = tune("bert", data_of("classification", long), max_dropped=0.2)
    warned = [fields["text"] for kind, fields in made.events if kind == "warning"]
    assert any("1 of 13 examples of the split `train` dropped (1 too long)" in text for text in warned)
    with pytest.raises(StageError, match="more than max_dropped"):
        tune("bert", data_of("classification", long, "b"), "b", max_dropped=0.01)
    with pytest.raises(InputError, match=r"tokens, the model's context is 48"):
        tune("bert", data_of("classification", long, "c"), "c", too_long="error")


def test_a_model_without_the_head_is_not_measured(bases, data_of, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model has no head for classification: it gives logits"):
        measure(tmp_path, bases["bert"], data_of("classification"))
    with pytest.raises(UsageError, match="holds rows of task classification"):
        measure(tmp_path, bases["bert"], data_of("classification"), tasks=["embedding"])


def test_the_classes_are_those_of_the_things(tune, data_of) -> None:
    path = tune("bert", data_of("classification"), max_steps=1).outputs["model"].path
    assert load_model(path).config.labels == tuple(sorted(set(COLOUR_OF.values())))
    assert len(THINGS) == 12
