"""kill -9 at random instants of a run, of the runner or of the stage's process: nothing is left over, nothing is lost.

After every kill no process of the run is alive, every artifact in the store is whole, and the next run goes on. When
it is done at last, every result has the content id that a run without any kill gives it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmctl.store import Store

HERE = Path(__file__).parent
PATIENCE = 5.0
"""Seconds within which everything of a killed run must be gone."""
LONGEST_ROUND = 120.0


@dataclass(frozen=True)
class Kill:
    """When to kill: `delay` seconds after the event `type` of `stage` was seen for the `count`th time."""

    stage: str
    type: str
    delay: float
    count: int = 1


class Round:
    """One run that is to be killed, in a directory of its own beside the store."""

    def __init__(self, work: Path, env: dict[str, str], *args: str) -> None:
        self.events = work / "events.jsonl"
        self.events.unlink(missing_ok=True)
        self.store = work / "store"
        command = [sys.executable, "-m", "llmctl", "run", "tiny.yaml", "--store", self.store, "--events", self.events]
        self.log = (work / "stderr").open("w+")
        self.process = subprocess.Popen(
            [*command, *args], cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.log
        )

    def follow(self) -> Iterator[dict]:
        """Events as they are written, until the run ends."""
        at, end = 0, time.monotonic() + LONGEST_ROUND
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            text = self.events.read_bytes()[at:] if self.events.exists() else b""
            for line in text.splitlines(keepends=True):
                if line.endswith(b"\n"):
                    at += len(line)
                    yield json.loads(line)
            if ended:
                return
            time.sleep(0.005)
        raise AssertionError(f"the run took longer than {LONGEST_ROUND:.0f} s")

    def wait_for(self, kill: Kill) -> bool:
        """Return at the instant of the kill, or as soon as it is too late for it; False if the run has ended."""
        seen = 0
        for event in self.follow():
            if event.get("stage") != kill.stage:
                continue
            seen += event["type"] == kill.type
            if seen == kill.count:
                time.sleep(kill.delay)
                return self.process.poll() is None
            if event["type"] in ("stage.cached", "stage.end"):
                return self.process.poll() is None
        return False

    def kill(self, what: str) -> str:
        """End the runner or the stage's process without warning; which of them it was."""
        if what == "stage":
            for pid in leaders(self.store, self.process.pid):
                os.kill(pid, signal.SIGKILL)
                self.process.wait(30)
                return "stage"
        self.process.kill()
        self.process.wait(30)
        return "runner"

    def stderr(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def processes(store: Path) -> dict[int, str]:
    """Processes whose command line names the store: runners, stages and their watchdogs."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(store) in command:
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
    return found


def leaders(store: Path, runner: int) -> list[int]:
    """The stage processes that a runner has started."""
    found = []
    for pid, command in processes(store).items():
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == runner and " stage exec " in command:
            found.append(pid)
    return found


def assert_nothing_runs(store: Path) -> None:
    end = time.monotonic() + PATIENCE
    while left := processes(store):
        assert time.monotonic() < end, f"left after the kill: {left}"
        time.sleep(0.02)


def assert_whole(root: Path) -> None:
    """Every artifact has the bytes of its manifest, and every published key leads to artifacts."""
    store = Store.open(root)
    directories = [path for path in (root / "artifacts/sha256").glob("*/*")]
    assert {f"sha256:{path.name}" for path in directories} == set(store.ids())
    for id in store.ids():
        store.verify(id)
    for path in (root / "keys").glob("*/*.json"):
        assert store.lookup(f"sha256:{path.stem}") is not None


def results(work: Path) -> dict[str, str]:
    """Content ids of the last run's outputs; metrics hold times and differ."""
    run = max((work / "store/runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    stages = json.loads(run.read_text())["stages"]
    outputs = {f"{id}.{port}": out for id, stage in stages.items() for port, out in stage["outputs"].items()}
    return {name: out["id"] for name, out in outputs.items() if out["type"] != "metrics"}


def resumed(work: Path) -> int:
    """How many stage processes went on from a checkpoint, by the events of all runs."""
    events = (path.read_text() for path in (work / "store/runs").glob("*/events.jsonl"))
    return sum(text.count('"continuing from step') for text in events)


def finish(work: Path, env: dict[str, str], *args: str) -> None:
    last = Round(work, env, *args)
    try:
        assert last.process.wait(LONGEST_ROUND) == 0, last.stderr()
    finally:
        last.close()


def survive(work: Path, env: dict[str, str], kills: list[Kill], random: random.Random, *args: str) -> Counter[str]:
    """Run and kill once for each of `kills`; what was killed, and how often."""
    killed: Counter[str] = Counter()
    for number, kill in enumerate(kills):
        round = Round(work, env, *args)
        try:
            if round.wait_for(kill):
                what = round.kill(random.choice(("runner", "stage")))
                killed[what] += 1
                code = round.process.returncode
                assert code == (-signal.SIGKILL if what == "runner" else 3) or code == 0, round.stderr()
                if code == 3:
                    assert "was killed (SIGKILL)" in round.stderr()
            else:
                assert round.process.returncode == 0, round.stderr()
        finally:
            round.close()
        assert_nothing_runs(work / "store")
        assert_whole(work / "store")
        print(f"{number + 1}: {kill} {killed}")
    return killed


@pytest.fixture
def env() -> dict[str, str]:
    dropped = ("LLMCTL_", "NO_COLOR", "CLICOLOR", "FORCE_COLOR", "CI", "PYTHONPATH")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(dropped)},
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories with the same spec: for the run without kills, and for the one with them."""
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        shutil.copy(HERE / "tiny.yaml", tmp_path / name)
    return tmp_path / "straight", tmp_path / "killed"


@pytest.mark.slow
def test_three_kills_of_a_training(pair, env):
    straight, killed = pair
    finish(straight, env, "--to", "tokenize")
    shutil.copytree(straight / "store", killed / "store")
    finish(straight, env, "--to", "train")
    dice = random.Random(3)
    kills = [
        Kill("train", "stage.checkpoint", dice.uniform(0, 0.05), count=3),
        Kill("train", "stage.progress", dice.uniform(0, 0.2)),
        Kill("train", "artifact", dice.uniform(0, 0.01)),
    ]
    assert survive(killed, env, kills, dice, "--to", "train").total() == 3
    finish(killed, env, "--to", "train")
    assert results(killed) == results(straight)
    assert resumed(killed) >= 1
    assert_left_clean(killed / "store")


def assert_left_clean(store: Path) -> None:
    """A good run leaves neither staged outputs nor half-written files, of its own or of those that were killed."""
    assert [path.name for path in (store / "tmp").iterdir()] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_kills_of_the_whole_chain(pair, env):
    straight, killed = pair
    finish(straight, env, "--to", "int8")
    dice = random.Random(int(os.environ.get("CRASH_SEED", "1")))

    def at(stage: str, type: str, longest: float, times: int, counts: tuple[int, ...] = (1,)) -> list[Kill]:
        return [Kill(stage, type, dice.uniform(0, longest), dice.choice(counts)) for _ in range(times)]

    kills = [
        *at("data", "stage.start", 2.5, 2),
        *at("tokenize", "stage.start", 0.7, 1),
        *at("train", "stage.start", 2.5, 2),
        *at("train", "stage.progress", 0.3, 2),
        *at("train", "stage.checkpoint", 0.03, 3, (1, 2, 3)),
        *at("train", "artifact", 0.02, 2, (1, 2)),
        *at("sft", "stage.start", 3, 1),
        *at("sft", "stage.checkpoint", 0.03, 2, (2, 3)),
        *at("sft", "artifact", 0.02, 1),
        *at("dpo", "stage.progress", 0.1, 1),
        *at("prune", "stage.start", 2.5, 1),
        *at("distill", "stage.checkpoint", 0.05, 1, (1, 2)),
        *at("distill", "artifact", 0.02, 1),
        *at("onnx", "stage.start", 5, 2),
        *at("onnx", "stage.progress", 2.5, 2),
        *at("onnx", "artifact", 0.02, 1),
        *at("int8", "stage.start", 0.8, 1),
        *at("int8", "artifact", 0.1, 1),
    ]
    count = survive(killed, env, kills, dice, "--to", "int8")
    assert count.total() >= 20 and min(count["runner"], count["stage"]) >= 5, count
    finish(killed, env, "--to", "int8")
    assert results(killed) == results(straight)
    assert resumed(killed) >= 3
    assert_left_clean(killed / "store")
    exported, expected = killed / "exports/tiny", straight / "exports/tiny"
    names = {path.name for path in expected.iterdir()} - {"llmctl.json"}  # the manifest holds times
    # Nothing half-copied beside it; the report of a run of some stages lies in the run's directory.
    assert {path.name for path in (killed / "exports").iterdir()} == {"tiny"}
    assert {name: (exported / name).read_bytes() for name in names} == {
        name: (expected / name).read_bytes() for name in names
    }
