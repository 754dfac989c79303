"""kill -9 and SIGTERM at random instants, then the same command again: all is as in an uninterrupted run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import signal, sys
from pathlib import Path
import numpy as np, torch
from llmctl.errors import TempFail
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
params = TrainParams(max_steps=200, batch_size=4, save_every=3, dropout=0.1, ema=0.9)
def emit(kind, fields):
    if kind == "progress":
        print(fields["step"], flush=True)
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
ctx = Context("test", {"metrics": base / "metrics"}, base / "resume", emit, lambda: bool(asked))
try:
    fit(ctx, model, CausalLM(), ExampleSource(rows, 32, params), params)
except TempFail:
    sys.exit(75)
print("done", flush=True)
(base / "weights").write_bytes(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes())
"""


def start(base: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(base)], stdout=subprocess.PIPE, text=True, env=env)


def ended(base: Path, after: float, number: signal.Signals) -> int:
    """Signal a run `after` seconds beyond its first step; the last step it told of, or -1 if it was done."""
    child = start(base)
    assert child.stdout is not None
    steps = [child.stdout.readline().strip()]  # `done` at once where an earlier run got that far
    time.sleep(after)
    child.send_signal(number)
    rest, _ = child.communicate()
    assert child.returncode in (0, -number, 75)
    steps += rest.splitlines()
    return -1 if "done" in steps else int(steps[-1])


def finished(base: Path) -> str:
    child = start(base)
    out, _ = child.communicate()
    assert child.returncode == 0, out
    return hashlib.sha256((base / "weights").read_bytes()).hexdigest()


def state(base: Path) -> tuple[bytes, list[dict[str, float]]]:
    """The last checkpoint's tensors and curve, but for the speeds."""
    (path,) = (base / "resume/ckpt").iterdir()
    curve = json.loads((path / "values.json").read_text())["curve"]
    rows = [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in curve]
    return (path / "tensors.safetensors").read_bytes(), rows


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 12, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 10, marks=pytest.mark.slow),
    ],
)
def test_nothing_differs_after_ends_at_random_steps(tmp_path: Path, number: signal.Signals, times: int) -> None:
    for name in ("straight", "ended"):
        (tmp_path / name).mkdir()
    expected = finished(tmp_path / "straight")
    rng = random.Random(times)
    reached = [ended(tmp_path / "ended", rng.uniform(0, 0.3), number) for _ in range(times)]
    assert reached[0] > 0, "the first end came after the last step, nothing was tested"
    assert finished(tmp_path / "ended") == expected
    assert state(tmp_path / "ended") == state(tmp_path / "straight")
