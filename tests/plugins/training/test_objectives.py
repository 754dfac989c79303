"""`train-pretrain` with every objective but the next token: what is trained, measured, refused, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmctl.errors import InputError, TempFail, UsageError
from llmctl.nn.hf import load_model
from llmctl.registry import get_registry
from llmctl.stage import Artifact
from llmctl.testing import StageResult, run_stage

SMALL = {"dim": 32, "layers": 2, "heads": 4, "ff_dim": 64, "context": 48}
FAST = {"max_steps": 12, "batch_size": 4, "save_every": 5, "log_every": 4, "warmup_steps": 2, "threads": 1}
PRESETS = {
    "mlm-nsp": ("bert", "bert"),
    "mlm": ("roberta", "roberta"),
    "span": ("spanbert", "bert"),
    "corruption": ("t5", "t5"),
    "prefix": ("gpt2", "gpt"),
}
"""Objective: its preset and the special tokens that it needs."""


@pytest.fixture(scope="session")
def tokens_of(tmp_path_factory: pytest.TempPathFactory, world) -> Callable[[str], dict[str, Artifact]]:
    """Tokens and tokenizer of the tiny world for each kind of special tokens."""
    base, made = tmp_path_factory.mktemp("kinds"), {}

    def get(special: str) -> dict[str, Artifact]:
        if special not in made:
            params = {"vocab_size": 300, "special": special, **({"sentinels": 20} if special == "t5" else {})}
            made[special] = run_stage(get_registry().stages["tokenize"], base / special, params, text=world.text)
        return {name: made[special].outputs[name] for name in ("tokens", "tokenizer")}

    return get


@pytest.fixture
def pretrain(tmp_path: Path, tokens_of) -> Callable[..., StageResult]:
    def run(
        objective: str, name: str = "run", params: dict[str, Any] | None = None, special: str = "", **given: Any
    ) -> StageResult:
        preset, usual = PRESETS[objective]
        shape = {} if given.get("model") else {"preset": preset, **SMALL}
        stop = given.pop("stop_after", None)
        inputs = {**tokens_of(special or usual), **given}
        values = {**shape, **FAST, **(params or {})}
        return run_stage(get_registry().stages["train-pretrain"], tmp_path / name, values, stop, **inputs)

    return run


@pytest.mark.parametrize("objective", PRESETS)
def test_the_objective_follows_from_the_preset_and_is_learnt(pretrain, objective: str) -> None:
    wanted = {"objective": "prefix"} if objective == "prefix" else {}
    made = pretrain(objective, params={"max_steps": 40, "embedding_lr": 0.01, **wanted})
    assert made.metrics["objective"] == objective
    losses = [value for _, value in made.curve("loss")]
    assert losses[-1] < losses[0] - 0.5
    expected = {
        "mlm-nsp": {"accuracy.validation", "next_accuracy.validation", "masked_loss.validation"},
        "mlm": {"accuracy.validation", "unigram_accuracy.validation", "unigram_loss.validation"},
        "span": {"accuracy.validation", "boundary_accuracy.validation", "boundary_loss.train"},
        "corruption": {"accuracy.validation", "loss.validation"},
        "prefix": {"bpb.validation"},
    }[objective]
    assert expected <= set(made.metrics)
    assert ("bpb.validation" in made.metrics) == (objective == "prefix")
    config = load_model(made.outputs["model"].path).config
    assert config.head == {"mlm-nsp": "pretraining", "mlm": "mlm", "span": "mlm"}.get(objective, "lm")


@pytest.mark.parametrize("objective", PRESETS)
def test_resume_is_bit_identical(pretrain, weights, objective: str) -> None:
    wanted = {"objective": objective}
    straight = pretrain(objective, "straight", wanted)
    for stop in (1, 7):
        with pytest.raises(TempFail):
            pretrain(objective, "stopped", wanted, stop_after=stop)
    resumed = pretrain(objective, "stopped", wanted)
    assert weights(straight) == weights(resumed)
    if objective == "span":
        first, second = ((made.outputs["model"] / "auxiliary.safetensors").read_bytes() for made in (straight, resumed))
        assert first == second
    assert weights(pretrain(objective, "other", {**wanted, "seed": 1})) != weights(straight)


CLASSES = {
    "mlm-nsp": "AutoModelForPreTraining",
    "mlm": "AutoModelForMaskedLM",
    "span": "AutoModelForMaskedLM",
    "corruption": "AutoModelForSeq2SeqLM",
    "prefix": "AutoModelForCausalLM",
}


@pytest.mark.parametrize("objective", PRESETS)
def test_transformers_loads_what_was_trained(pretrain, objective: str) -> None:
    import transformers

    path = pretrain(objective, params={"objective": objective}).outputs["model"].path
    peer, found = getattr(transformers, CLASSES[objective]).from_pretrained(path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    ours = load_model(path).eval()
    ids = torch.tensor([[5, 40, 41, 60, 7]])
    with torch.no_grad():
        if objective == "corruption":
            theirs = peer(input_ids=ids, decoder_input_ids=ids).logits
            mine = ours(ids, memory=ours.remember(ids))
        else:
            out = peer(input_ids=ids)
            theirs, mine = out.prediction_logits if objective == "mlm-nsp" else out.logits, ours(ids)
    assert (mine - theirs).abs().max() < 1e-5


def test_the_boundary_head_stands_beside_the_weights_and_is_taken_up_again(pretrain) -> None:
    made = pretrain("span")
    path = made.outputs["model"].path
    saved = load_file(path / "auxiliary.safetensors")
    assert saved["boundary.positions.weight"].shape == (10, 200)
    assert not any("boundary" in name for name in load_file(path / "model.safetensors"))
    more = pretrain("span", "more", {"lr": 1e-9, "max_steps": 1, "embedding_lr": 1e-9}, model=made.outputs["model"])
    again = load_file(more.outputs["model"].path / "auxiliary.safetensors")
    assert max(float((saved[name] - again[name]).abs().max()) for name in saved) < 1e-6
    assert more.metrics["objective"] == "span"
    with pytest.raises(InputError, match="does not fit a model of width 32 with spans of up to 5"):
        pretrain("span", "other", {"span_max": 5}, model=made.outputs["model"])
    alone = pretrain("span", "alone", {"boundary": False})
    assert not (alone.outputs["model"].path / "auxiliary.safetensors").exists()
    assert "boundary_loss.train" not in alone.metrics
    # A fresh one on a model that never had it is a function of the seed alone.
    found = []
    for name in ("one", "two"):
        torch.rand(len(found) + 1)
        made = pretrain("span", name, {"max_steps": 1, "objective": "span"}, model=alone.outputs["model"])
        found.append((made.outputs["model"].path / "auxiliary.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("mlm", {"mask_share": 0.3}),
        ("mlm", {"masking": "static"}),
        ("mlm-nsp", {"mask_share": 0.3}),
        ("span", {"span_p": 0.5}),
        ("span", {"span_max": 3}),
        ("span", {"span_unit": "tokens"}),
        ("span", {"masking": "static"}),
        ("corruption", {"noise_density": 0.3}),
        ("corruption", {"mean_noise_span": 5.0}),
        ("corruption", {"packing": "none"}),
    ],
)
def test_every_setting_changes_what_is_learnt(pretrain, objective: str, changes: dict[str, Any]) -> None:
    usual, other = pretrain(objective, "a", {"max_steps": 3}), pretrain(objective, "b", {"max_steps": 3, **changes})
    name = "loss.train" if "packing" not in changes else "tokens_per_s"
    assert usual.metrics[name] != other.metrics[name]
    if "mask_share" in changes:
        assert other.metrics["targets"] > 1.5 * usual.metrics["targets"]
    if "packing" in changes:  # the same loss, rows filled otherwise
        assert usual.metrics["loss.train"] == pytest.approx(other.metrics["loss.train"], abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "params", "message"),
    [
        ("prefix", {"objective": "mlm"}, "objective mlm does not fit gpt2, a decoder"),
        ("mlm", {"objective": "causal"}, "objective causal does not fit roberta, an encoder"),
        ("corruption", {"objective": "mlm-nsp"}, "objective mlm-nsp does not fit t5, an encoder-decoder"),
        ("mlm", {"objective": "mlm-nsp"}, "needs two token types, roberta has 1"),
        ("mlm", {"span_p": 0.5}, "span_p has no effect on objective mlm"),
        ("mlm-nsp", {"boundary": False}, "boundary has no effect on objective mlm-nsp"),
        ("corruption", {"mask_share": 0.5}, "mask_share has no effect on objective corruption"),
        ("prefix", {"noise_density": 0.5}, "noise_density has no effect on objective causal"),
    ],
)
def test_contradictions_are_usage_errors(pretrain, objective: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pretrain(objective, params=params)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("objective", "special", "message"),
    [
        ("mlm", "gpt", r"has no \[MASK\] token"),
        ("mlm-nsp", "t5", r"has no \[MASK\] and no \[CLS\] token"),
        ("corruption", "bert", "has no sentinels"),
    ],
)
def test_a_tokenizer_without_what_is_needed(pretrain, objective: str, special: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pretrain(objective, special=special)
    assert "special:" in caught.value.hint


def test_too_few_sentinels_are_named(pretrain) -> None:
    with pytest.raises(UsageError, match="noise spans, the tokenizer 20 sentinels"):
        pretrain("corruption", params={"mean_noise_span": 1.0, "noise_density": 0.5})


def test_a_model_without_the_head_is_not_continued_with_the_objective(pretrain) -> None:
    model = pretrain("span").outputs["model"]
    with pytest.raises(UsageError, match="objective mlm-nsp needs the head pretraining"):
        pretrain("mlm-nsp", "more", {"objective": "mlm-nsp"}, model=model)
    assert pretrain("mlm", "mlm", {"objective": "mlm"}, special="bert", model=model).metrics["objective"] == "mlm"


def test_a_prefix_model_with_an_encoder(pretrain) -> None:
    made = pretrain("corruption", params={"objective": "prefix"})
    assert made.metrics["objective"] == "prefix" and "bpb.validation" in made.metrics
