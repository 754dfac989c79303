"""A checkpoint that two ranks have written goes on where one has, or four: losses equal to six digits."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("rank_program.py")
ZERO1, ZERO3, TP = {"dp_replicate": 2, "shard_optimizer": True}, {"dp_shard": 2}, {"tp": 2}
MUON = {"optimizer": "muon", "muon_variance": True, "weight_decay": 0.1, "cautious_decay": True, "ema": 0.9}
HALF, WHOLE = 5, 10
PARTED = {"fsdp": ZERO3, "tp": TP, "zero-1": ZERO1}
BY_MUON = {f"muon {name}": PARTED[name] for name in ("fsdp", "zero-1")}


def case(name: str, parallel: dict[str, Any], double: bool = False, **params: Any) -> dict[str, Any]:
    return {"name": name, "double": double, "params": {**params, **({"parallel": parallel} if parallel else {})}}


def launch(cases: list[dict[str, Any]], out: Path, ranks: int) -> Path:
    """Run the cases in `ranks` processes, as torchrun would start them; returns where their results lie."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases))
    port = str(random.SystemRandom().randrange(20000, 32000))
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    words = [sys.executable, PROGRAM, out / "cases.json", out]
    started = [
        subprocess.Popen(
            words,
            env={**env, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=250)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(said)
    return out


def losses(out: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (out / name / "metrics/curves.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def cases(steps: int, parallel: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every way to part a model, AdamW and Muon; `parallel` is how all of them are continued instead."""
    found = [case(name, PARTED[name] if parallel is None else parallel, max_steps=steps) for name in PARTED]
    found += [case(name, BY_MUON[name] if parallel is None else parallel, max_steps=steps, **MUON) for name in BY_MUON]
    found.append(case("adafactor", ZERO3 if parallel is None else parallel, max_steps=steps, optimizer="adafactor"))
    return [*found, case("fine", ZERO3 if parallel is None else parallel, max_steps=steps, double=True)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(cases(WHOLE), tmp_path_factory.mktemp("straight"), 2)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(cases(HALF), tmp_path_factory.mktemp("half"), 2)


def go_on(half: Path, out: Path, parallel: dict[str, Any], ranks: int) -> Path:
    for one in cases(WHOLE):
        shutil.copytree(half / one["name"] / "resume", out / one["name"] / "resume")
    return launch(cases(WHOLE, parallel), out, ranks)


def check(straight: Path, further: Path) -> None:
    for one in cases(WHOLE):
        name = one["name"]
        expected, found = losses(straight, name), losses(further, name)
        assert found[:HALF] == expected[:HALF] and len(found) == WHOLE, name  # it was continued, not begun anew
        assert found == pytest.approx(expected, rel=1e-12 if name == "fine" else 1e-6), name
        # The control: six digits are a thousand times less than steps change.
        assert max(abs(a - b) for a, b in zip(expected, expected[1:], strict=False)) > 1e-3


@pytest.mark.slow
def test_two_ranks_then_one(straight: Path, half: Path, tmp_path: Path) -> None:
    parts = sorted(path.name for path in (half / "fsdp/resume/ckpt/step-5").iterdir())
    assert parts == ["index.json", "rank-0.safetensors", "rank-1.safetensors", "values.json"]
    sizes = [(half / f"fsdp/resume/ckpt/step-5/rank-{rank}.safetensors").stat().st_size for rank in range(2)]
    assert max(sizes) < 0.6 * sum(sizes)  # each has written its part alone
    index = json.loads((half / "fsdp/resume/ckpt/step-5/index.json").read_text())
    assert len(index["model/embedding.weight"]["parts"]) == 2
    check(straight, go_on(half, tmp_path, {}, 1))


@pytest.mark.slow
def test_two_ranks_then_four(straight: Path, half: Path, tmp_path: Path) -> None:
    check(straight, go_on(half, tmp_path, {"dp_shard": 4}, 4))


@pytest.mark.slow
def test_one_rank_then_two(tmp_path: Path, straight: Path) -> None:
    one = launch(cases(HALF, {}), tmp_path / "one", 1)
    for each in cases(WHOLE):
        shutil.copytree(one / each["name"] / "resume", tmp_path / "two" / each["name"] / "resume")
    two = launch(cases(WHOLE), tmp_path / "two", 2)
    for each in cases(WHOLE):
        assert losses(two, each["name"]) == pytest.approx(losses(straight, each["name"]), rel=1e-6)
