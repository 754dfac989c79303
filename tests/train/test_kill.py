"""kill -9 and SIGTERM at random instants and while saving, then the same command: the weights of an undisturbed run."""

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
params = TrainParams(max_steps=120, batch_size=4, save_every=3)
def emit(kind, fields):
    if kind == "progress":
        print(fields["step"], flush=True)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
ctx = Context("test", {"metrics": base / "metrics"}, base / "resume", emit, lambda: bool(asked))
try:
    fit(ctx, model, CausalLM(), ExampleSource(rows, 32, params), params)
except TempFail as error:
    print(error.message.split("step ")[1].split()[0], flush=True)
    sys.exit(75)
print("done", flush=True)
(base / "weights").write_bytes(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes())
"""


KILL = """
import os, signal
from llmctl.train import storage
moment, step = {moment!r}, {step}
def die(): os.kill(os.getpid(), signal.SIGKILL)
def killed(owner, name, before):
    original = getattr(owner, name)
    def wrapped(self, *given):
        if before and self.final.name == f"step-{{step}}": die()
        found = original(self, *given)
        if not before and self.final.name == f"step-{{step}}": die()
        return found
    setattr(owner, name, wrapped)
if moment == "half a file":
    write = storage.save_file
    def half(parts, path):
        write(parts, path)
        if f"step-{{step}}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            die()
    storage.save_file = half
else:
    killed(storage.Writer, "write_data" if "parts" in moment else "finish", moment.startswith("before"))
"""
"""Ends the process in the middle of writing the checkpoint of one step."""
MOMENTS = ("before the parts", "half a file", "after the parts", "after the index")


def start(base: Path, before: str = "") -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", before + RUN, str(base)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a run that nobody disturbs."""
    return finished(tmp_path_factory.mktemp("straight"))


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
def test_weights_after_kills_equal_an_uninterrupted_runs(tmp_path: Path, expected: str, kills: int) -> None:
    (tmp_path / "killed").mkdir()
    rng = random.Random(kills)
    reached = [killed(tmp_path / "killed", rng.uniform(0, 0.3)) for _ in range(kills)]
    assert reached[0] > 0, "the first kill came after the end, nothing was tested"
    assert finished(tmp_path / "killed") == expected


@pytest.mark.slow
def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path: Path, expected: str) -> None:
    (tmp_path / "killed").mkdir()
    kept = tmp_path / "killed/resume/ckpt"
    for number, moment in enumerate(MOMENTS, 1):
        step = 24 * number
        child = start(tmp_path / "killed", KILL.format(moment=moment, step=step))
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        whole = moment == "after the index"
        assert (kept / f"step-{step}").exists() == whole and (kept / f"step-{step - 3}").exists()
        assert (kept / f".tmp-step-{step}").exists() != whole
    assert finished(tmp_path / "killed") == expected
    assert [path.name for path in kept.iterdir()] == ["step-120"]


@pytest.mark.slow
def test_weights_after_sigterm_at_random_steps_equal_an_uninterrupted_runs(tmp_path: Path, expected: str) -> None:
    (tmp_path / "stopped").mkdir()
    rng = random.Random(10)
    reached: list[int] = []
    for _ in range(10):
        child = start(tmp_path / "stopped")
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate()
        if child.returncode == 0:
            break  # it was at its end
        assert child.returncode == 75, out
        reached.append(int(out.splitlines()[-1]))
        assert (tmp_path / f"stopped/resume/ckpt/step-{reached[-1]}").is_dir()
    assert reached == sorted(set(reached)) and len(reached) >= 3
    assert finished(tmp_path / "stopped") == expected
