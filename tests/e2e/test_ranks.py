"""Training in two processes through the command line: the model of one process, and of a run whose rank was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from llmctl.store import Store

SPEC = """
llmctl: 1
name: p
stages:
  data:
    uses: data
    with: {reader: python-stdlib, modules: [textwrap, shlex, bisect], validation_share: 0.2, questions: {facts: 8}}
  tokenize:
    uses: tokenize
    inputs: {text: data}
    with: {vocab_size: 300}
  train:
    uses: train-pretrain
    inputs: {tokens: tokenize, tokenizer: tokenize}
    with: {dim: 32, layers: 2, heads: 2, kv_heads: 2, context: 32, max_steps: 12, batch_size: 8, save_every: 4,
           log_every: 1}
"""


def train(work: Path, store: str, *words: str, kill_at: int | None = None) -> str:
    """Run the spec in a store of its own; a rank is killed when it tells of the checkpoint `kill_at`."""
    (work / "p.yaml").write_text(SPEC)
    program = Path(sys.executable).with_name("llmctl")
    sets = [part for word in words for part in ("--set", f"stages.train.with.{word}")]
    if not (work / "data").exists():
        subprocess.run([program, "run", "p.yaml", "--to", "tokenize", "--store", work / "data"], cwd=work, check=True)
    shutil.copytree(work / "data", work / store)
    said = []
    with subprocess.Popen(
        [program, "run", "p.yaml", "--store", work / store, *sets],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if kill_at and f"train: checkpoint at step {kill_at}\n" in line:
                os.kill(rank_1(work / store), signal.SIGKILL)
                kill_at = None
    assert process.returncode == 0, "".join(said)
    assert kill_at is None
    return "".join(said)


def rank_1(store: Path) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"llmctl.launch.worker" in words and str(store).encode() in words and b"RANK=1" in variables:
            return int(path.name)
    raise AssertionError("there is no rank 1")


def curve(work: Path, store: str) -> list[float]:
    path = Store(work / store).resolve("p/train.metrics") / "curves.jsonl"
    return [row["loss"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path: Path) -> None:
    for store, words in (("one", []), ("two", ["parallel.dp_shard=2"])):
        train(tmp_path, store, *words)
    assert curve(tmp_path, "two") == pytest.approx(curve(tmp_path, "one"), abs=1e-4)
    assert len(curve(tmp_path, "two")) == 12
    one, two = (load_file(Store(tmp_path / name).resolve("p/train") / "model.safetensors") for name in ("one", "two"))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
    assert max(abs(one[name] - two[name]).max() for name in one) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dp_replicate=2", "dp_shard=2", "tp=2", "cp=2", "pp=2"])
def test_a_run_whose_rank_is_killed_ends_as_an_undisturbed_one(tmp_path: Path, scheme: str) -> None:
    straight = train(tmp_path, "straight", f"parallel.{scheme}", "max_steps=40")
    killed = train(tmp_path, "killed", f"parallel.{scheme}", "max_steps=40", kill_at=8)
    assert "a rank was lost" in killed and "a rank was lost" not in straight
    assert curve(tmp_path, "killed") == curve(tmp_path, "straight")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["{pp: 2}", "{cp: 2}"])
def test_layers_and_sequences_over_two_processes_give_the_model_of_one(tmp_path: Path, sizes: str) -> None:
    from transformers import AutoModelForCausalLM

    said = train(tmp_path, "one"), train(tmp_path, "two", f"parallel={sizes}")
    assert curve(tmp_path, "two") == pytest.approx(curve(tmp_path, "one"), abs=1e-4)
    assert ("bubble 12.5% of the time" in said[1]) == ("pp" in sizes)
    models = [AutoModelForCausalLM.from_pretrained(Store(tmp_path / s).resolve("p/train").path) for s in ("one", "two")]
    tokens = torch.arange(32)[None]
    one, two = (model(tokens).logits for model in models)
    assert float((one - two).detach().abs().max()) < 1e-3
