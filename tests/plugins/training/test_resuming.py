"""`llmctl verify-resume`: nothing to find where training is exact, and what is planted is found and named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmctl.errors import TempFail, UsageError
from llmctl.registry import get_registry
from llmctl.spec.pipeline import load_pipeline
from llmctl.testing import resuming
from llmctl.testing.phase import Phase

SPEC = """
llmctl: 1
name: tiny
stages:
  data:
    uses: data
    with: {reader: python-stdlib, modules: [textwrap, shlex, bisect], validation_share: 0.2, questions: {facts: 8}}
  tokenize: {uses: tokenize, inputs: {text: data}, with: {vocab_size: 300}}
  train:
    uses: train-pretrain
    inputs: {tokens: tokenize, tokenizer: tokenize}
    with: {dim: 32, layers: 2, heads: 2, context: 32, batch_size: 4, max_steps: 50, dropout: 0.1, threads: 1}
"""
PLANT = """
import sys
if "llmctl.testing.phase" in sys.orig_argv:
    import torch
    torch.set_rng_state = lambda state: None
"""


def in_this_process(phase: Phase) -> None:
    torch.manual_seed(phase.stop)  # what a fresh process has is not what the one before left
    try:
        phase.run()
    except TempFail:
        assert phase.stop


def compared(world: Any, directory: Path, **changes: Any) -> tuple[list[str], int]:
    stage = get_registry().stages["train-pretrain"]
    spec = SimpleNamespace(id="train", stage=stage)
    params = {"dim": 32, "layers": 1, "heads": 2, "context": 32, "max_steps": 6, "batch_size": 4, "log_every": 1}
    inputs = {"tokens": [world.tokens], "tokenizer": [world.tokenizer]}
    found, tensors = resuming.compare(spec, {**params, "dropout": 0.1, "threads": 1, **changes}, inputs, directory)
    return [str(one) for one in found], tensors


def test_an_exact_training_has_no_difference(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resuming, "run", in_this_process)
    found, tensors = compared(world, tmp_path, ema=0.9)
    assert found == [] and tensors > 20


def test_a_state_that_is_not_restored_is_found_and_named(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resuming, "run", in_this_process)
    restore = torch.set_rng_state
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    found, _ = compared(world, tmp_path)
    monkeypatch.setattr(torch, "set_rng_state", restore)
    assert found[0].startswith("model/") and ", element " in found[0]
    assert any(one.startswith("optimizer/") for one in found) and any(one.startswith("random/cpu") for one in found)
    # Where it begins: the curves are the same up to the stop.
    steps = [one for one in found if one.startswith("curve[") and ".loss" in one]
    assert steps and steps[0].startswith("curve[3].loss: ")
    assert any(one.startswith("the file model/model.safetensors") for one in found)


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SPEC)
    pipeline = load_pipeline(str(tmp_path / "a.yaml"), (), (), registry=get_registry())
    assert resuming.training_stage(pipeline, None).id == "train"
    params = resuming.shortened(pipeline.stages["train"], 8)
    assert params["max_steps"] == 8 and resuming.shortened(pipeline.stages["train"], 80)["max_steps"] == 50
    with pytest.raises(UsageError, match="`data` is no stage that trains") as error:
        resuming.training_stage(pipeline, "data")
    assert error.value.hint == "stages that train: train"


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(SPEC)
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted/sitecustomize.py").write_text(PLANT)

    def verify(**env: str) -> subprocess.CompletedProcess[str]:
        words = [Path(sys.executable).with_name("llmctl"), "verify-resume", "tiny.yaml", "--steps", "6"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        return subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=250)

    done = verify()
    assert done.returncode == 0, done.stderr
    assert "train: 6 steps at once and 3 + 3 end bit for bit the same" in done.stdout
    done = verify(PYTHONPATH=str(tmp_path / "planted"))
    assert done.returncode == 3 and "first in model/" in done.stderr, done.stderr
