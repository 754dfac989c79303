"""kill -9 at random instants, then the same command again: the weights are those of an uninterrupted run."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import sys
from pathlib import Path
import numpy as np, torch
from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.stage import Context
from llmctl.train.batches import Example
from llmctl.train.data import ExampleSource
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams

base = Path(sys.argv[1])
torch.manual_seed(0)
model = Transformer(ModelConfig(arch="llama", vocab_size=48, dim=32, layers=2, heads=4, context=32, ff_dim=48))
rng = np.random.default_rng(0)
rows = [Example(rng.integers(0, 48, n), np.ones(n, bool)) for n in rng.integers(5, 30, 40)]
params = TrainParams(max_steps=200, batch_size=4, save_every=3)
def emit(kind, fields):
    if kind == "progress":
        print(fields["step"], flush=True)
ctx = Context("test", {"metrics": base / "metrics"}, base / "resume", emit)
fit(ctx, model, CausalLM(), ExampleSource(rows, 32, params), params)
print("done", flush=True)
(base / "weights").write_bytes(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes())
"""


def start(base: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(base)], stdout=subprocess.PIPE, text=True, env=env)


def killed(base: Path, after: float) -> int:
    """Kill a run `after` seconds beyond its first step; the last step it told of, or -1 if it was done."""
    child = start(base)
    assert child.stdout is not None
    steps = [child.stdout.readline().strip()]  # `done` at once where an earlier run got that far
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate()
    steps += rest.splitlines()
    return -1 if "done" in steps else int(steps[-1])


def finished(base: Path) -> str:
    child = start(base)
    out, _ = child.communicate()
    assert child.returncode == 0, out
    return hashlib.sha256((base / "weights").read_bytes()).hexdigest()


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_weights_after_kills_equal_an_uninterrupted_runs(tmp_path: Path, kills: int) -> None:
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    expected = finished(tmp_path / "straight")
    rng = random.Random(kills)
    reached = [killed(tmp_path / "killed", rng.uniform(0, 0.3)) for _ in range(kills)]
    assert reached[0] > 0, "the first kill came after the end, nothing was tested"
    assert finished(tmp_path / "killed") == expected
