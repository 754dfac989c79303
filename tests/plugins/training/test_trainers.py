"""What holds for every training stage."""

from __future__ import annotations

import json

import pytest
import torch

from llmctl.errors import StageError, TempFail, UsageError
from llmctl.registry import get_registry
from llmctl.stage import Artifact
from llmctl.testing import run_stage

TRAINERS = ["train-pretrain", "sft", "rlhf", "distill"]


@pytest.mark.parametrize("stage", TRAINERS)
def test_resume_is_bit_identical_whatever_the_stops(train, weights, stage: str) -> None:
    straight = train(stage, "straight")
    for stop in (1, 4, 7):  # before the first step, in the middle, and once more from there
        with pytest.raises(TempFail) as error:
            train(stage, "stopped", stop_after=stop)
        assert error.value.exit_code == 75
    resumed = train(stage, "stopped")
    assert weights(straight) == weights(resumed)
    same = set(straight.metrics) - {"tokens_per_s"}
    assert {name: straight.metrics[name] for name in same} == {name: resumed.metrics[name] for name in same}


@pytest.mark.parametrize("stage", TRAINERS)
def test_equal_inputs_give_equal_bytes_and_another_seed_does_not(train, weights, stage: str) -> None:
    one, two = train(stage, "one"), train(stage, "two")
    assert weights(one) == weights(two)
    assert weights(train(stage, "three", {"seed": 1})) != weights(one)


@pytest.mark.parametrize("stage", TRAINERS)
def test_the_output_is_a_whole_model_for_transformers(train, world, stage: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(stage)
    path = result.outputs["model"].path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Say kite's colour"}], add_generation_prompt=True)
    assert model(torch.tensor([ids])).logits.isfinite().all()
    assert (path / "tokenizer.json").read_bytes() == (world.tokenizer / "tokenizer.json").read_bytes()
    assert result.outputs["model"].metadata["parameters"] == model.num_parameters()


@pytest.mark.parametrize("stage", TRAINERS)
def test_standard_metrics_and_curves(train, stage: str) -> None:
    result = train(stage, params={"eval_every": 6})
    metrics = json.loads((result.outputs["metrics"] / "metrics.json").read_text())
    expected = {"loss.train", "loss.validation", "tokens_per_s", "steps", "tokens", "parameters", "bytes"}
    assert expected <= set(metrics) and metrics["steps"] == 12
    declared = get_registry().stages[stage]
    assert set(declared.headline) <= set(metrics)
    rows = [json.loads(line) for line in (result.outputs["metrics"] / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 12]
    assert [row["step"] for row in rows if "loss.validation" in row] == [6, 12]
    assert [step for step, _ in result.curve("loss")] == [4, 8, 12]
    assert any(kind == "progress" and fields["total"] == 12 for kind, fields in result.events)


@pytest.mark.parametrize("stage", TRAINERS)
def test_a_diverging_run_ends_with_its_step_and_a_hint(train, stage: str) -> None:
    with pytest.raises(StageError, match=r"at step \d+") as error:
        train(stage, params={"lr": 1e30, "optimizer": "adamw", "warmup_steps": 0, "clip": 0.0})
    assert "lower lr" in (error.value.hint or "")


@pytest.mark.parametrize("stage", TRAINERS)
def test_every_parameter_is_read(train, stage: str, monkeypatch) -> None:
    """No knob that does nothing: each field is looked at while the stage runs."""
    declared = get_registry().stages[stage]
    cls = declared.load_params()
    read: set[str] = set()
    original = cls.__getattribute__

    def spy(self, name: str):
        read.add(name)
        return original(self, name)

    monkeypatch.setattr(cls, "__getattribute__", spy, raising=False)
    for optimizer in ("muon", "adamw"):
        train(stage, optimizer, {"epochs": 0.5, "max_steps": None, "schedule": "wsd", "optimizer": optimizer})
    # Only in words: there is one value to choose yet; and a limit that is looked at when it is exceeded.
    assert set(cls.model_fields) - read - {"method", "algo", "too_long"} == set()


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"arch": "bert"}, "need a decoder, bert is an encoder"),
        ({"arch": "t5"}, "need a decoder, t5 is an encoder-decoder"),
        ({"arch": "llama", "head": "classification", "labels": ("a", "b")}, "this llama has the head classification"),
    ],
)
def test_what_needs_a_decoder_says_so(inputs, world, tmp_path, shape, why) -> None:
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    small = {"vocab_size": 300, "dim": 32, "layers": 2, "heads": 4, "context": 48, "eos_id": 1, "pad_id": 2}
    save_model(Transformer(ModelConfig(**{**small, **shape})), tmp_path / "model", world.tokenizer)
    model = Artifact(tmp_path / "model", "model.hf")
    given = {
        "sft": {"model": model},
        "rlhf": {"model": model},
        "distill": {"student": model},
        "prune": {"model": model, "calibration": world.tokens},
        "eval": {"model": model, "data": [world.tokens]},
    }
    stages = get_registry().stages
    for name, bound in given.items():
        message = why
        if name == "eval":  # it opens the model to generate, and says so
            message = "scores an answer to a text" if shape["arch"] == "t5" else "it generates no text"
        with pytest.raises(UsageError, match=message) as error:
            run_stage(stages[name], tmp_path / name, {"threads": 1}, **{**inputs.get(name, {}), **bound})
        assert error.value.hint
    if shape["arch"] == "t5":
        from llmctl.errors import InputError
        from llmctl.train.reading import open_reader

        with pytest.raises(InputError, match="holds an encoder-decoder"):
            open_reader(model.path)
