"""A checkpoint as a model directory: the weights of the step, their mean, and what transformers reads of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from llmctl.errors import InputError, TempFail, UsageError
from llmctl.nn.hf import load_model
from llmctl.registry import get_registry
from llmctl.testing import run_stage
from llmctl.train.checkpoint import Checkpoints
from llmctl.train.exporting import model_of, open_checkpoint
from llmctl_train_pretrain.checkpoints import checkpoint

SHAPE = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "context": 32}


def stopped(world: Any, directory: Path, **changes: Any) -> Path:
    """A training that was stopped after 5 steps of 9; its work directory."""
    stage = get_registry().stages["train-pretrain"]
    params = {**SHAPE, "max_steps": 9, "batch_size": 4, "threads": 1, "save_every": 2, **changes}
    with pytest.raises(TempFail):
        run_stage(stage, directory, params, stop_after=6, tokens=world.tokens, tokenizer=world.tokenizer)
    return directory / ".resume"


def test_any_step_becomes_a_model_that_transformers_loads(world, tmp_path: Path) -> None:
    work = stopped(world, tmp_path / "run", ema=0.5)
    words = [str(work), str(tmp_path / "model"), "--tokenizer", str(world.tokenizer.path)]
    done = CliRunner().invoke(checkpoint, words, catch_exceptions=False)
    assert done.exit_code == 0 and done.output.endswith("parameters, step 5\n")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(20)[None]
    ours = load_model(tmp_path / "model").eval()
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == ours.config.vocab_size
    found = open_checkpoint(work / "ckpt/step-5")
    means = {name.removeprefix("mean/"): t for name, t in found.tensors.items() if name.startswith("mean/")}
    assert all(torch.equal(parameter, means[name]) for name, parameter in ours.named_parameters())
    last = model_of(found, "last")
    assert all(torch.equal(value, found.tensors[f"model/{name}"]) for name, value in last.state_dict().items())
    assert not torch.equal(last.embedding.weight, ours.embedding.weight)  # the control
    earlier = model_of(open_checkpoint(work / "ckpt/step-4"), "last")
    assert not torch.equal(last.embedding.weight, earlier.embedding.weight)


def test_schedule_free_weights_are_those_its_run_would_leave(world, tmp_path: Path) -> None:
    changes = {"optimizer": "schedule-free", "schedule": "constant", "warmup_steps": 1}
    work = stopped(world, tmp_path / "run", **changes)
    stage = get_registry().stages["train-pretrain"]
    params = {**SHAPE, "max_steps": 5, "batch_size": 4, "threads": 1, **changes}
    result = run_stage(stage, tmp_path / "short", params, tokens=world.tokens, tokenizer=world.tokenizer)
    left = load_model(result.outputs["model"].path)
    found = model_of(open_checkpoint(work))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), left.parameters(), strict=True))


def test_what_cannot_be_exported_is_told(world, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    work = stopped(world, tmp_path / "run")
    found = open_checkpoint(work)
    with pytest.raises(UsageError, match="step 5 has no mean of weights"):
        model_of(found, "mean")
    del found.values["config"]
    with pytest.raises(InputError, match="does not hold the shape of its model"):
        model_of(found)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    with pytest.raises(UsageError, match="full is not empty"):
        CliRunner().invoke(
            checkpoint, [str(work), str(tmp_path / "full")], catch_exceptions=False, standalone_mode=False
        )
    newest = Checkpoints(work / "ckpt").steps()[-1]
    (work / f"ckpt/step-{newest}/rank-0.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="is damaged"):
        open_checkpoint(work)
