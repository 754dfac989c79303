"""`llmctl checkpoint`: the model of a checkpoint is the one that a training to that step leaves, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from llmctl.pipeline.checkpoints import listed
from llmctl.store import Store

TRAINED = """
data: {uses: data, with: {reader: python-stdlib, modules: [textwrap, shlex, bisect], validation_share: 0.2,
  questions: {facts: 5, heldout_entities: 2, unanswerable: 2}}}
tokenize: {uses: tokenize, inputs: {text: data}, with: {vocab_size: 400}}
train: {uses: train-pretrain, inputs: {tokens: tokenize, tokenizer: tokenize}, with: {dim: 32, layers: 1, heads: 2,
  kv_heads: 1, context: 64, max_steps: 20, batch_size: 4, schedule: constant, dropout: 0.1, ema: 0.9, save_every: 20}}
"""


def test_what_is_not_there_is_told(fake_stages, llmctl, spec, work):
    spec("a: {uses: make}\nc: {uses: learn, inputs: {text: a}}\n")
    done = llmctl("checkpoint", "p.yaml", "c")
    assert (done.returncode, done.stdout) == (0, "`c` has no checkpoint\n")
    for words, code, said in (
        (("c", "--to", "out"), 5, "`c` has no checkpoint yet"),
        (("c", "--step", "3"), 2, "--step and --force say how to write a model"),
        (("a",), 2, "`a` does not train in steps"),
    ):
        done = llmctl("checkpoint", "p.yaml", *words)
        assert done.returncode == code and said in done.stderr
    assert not (work / "out").exists()


def test_checkpoints_are_listed_by_step(tmp_path):
    for name in ("step-100", "step-20", ".tmp-step-120", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "values.json").write_text("{}")
    assert [(row["step"], row["bytes"]) for row in listed(tmp_path)] == [(20, 2), (100, 2)]
    assert listed(tmp_path / "none") == []


@pytest.mark.slow
def test_a_model_of_any_step(llmctl, llmctl_env, spec, work):
    """One run ends at step 20; another one goes far beyond, is stopped, and gives its model of step 20."""
    spec(TRAINED)
    env = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = llmctl("run", "p.yaml", "--store", "short", env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    expected = (Store(work / "short").resolve("p/train.model") / "model.safetensors").read_bytes()
    far = ("--store", "far", "--set", "train.max_steps=100000")
    command = [sys.executable, "-m", "llmctl", "run", "p.yaml", *far]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=work, env={**llmctl_env, **env}, **pipes) as process:
        for line in process.stderr:
            if "checkpoint at step 20\n" in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    rows = json.loads(llmctl("checkpoint", "p.yaml", "train", *far, "--format", "json", env=env).stdout)
    assert [row["step"] for row in rows][0] == 20 and len(rows) == 2
    for step, name in ((20, "out"), (rows[1]["step"], "newest")):
        done = llmctl("checkpoint", "p.yaml", "train", *far, "--step", str(step), "--to", name, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
    assert (work / "out/model.safetensors").read_bytes() == expected
    assert (work / "newest/model.safetensors").read_bytes() != expected
    again = json.loads(llmctl("checkpoint", "p.yaml", "train", *far, "--format", "json", env=env).stdout)
    assert [row["step"] for row in again] == [row["step"] for row in rows]  # all are still there
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "out")
    assert model.config.hidden_size == 32
