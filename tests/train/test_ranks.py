"""Training on several processes equals training on one: weights after 5 clipped AdamW steps, losses in float64."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).with_name("rank_program.py")
Case = dict[str, Any]


def launch(cases: list[Case], out: Path, ranks: int) -> Path:
    """Run the cases in `ranks` processes, as torchrun would start them; returns where their results lie."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases))
    port = random.SystemRandom().randrange(20000, 32000)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, out / "cases.json", out],
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
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


def weights(out: Path, name: str) -> torch.Tensor:
    return torch.cat([value.flatten() for value in torch.load(out / name / "weights.pt").values()])


def losses(out: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (out / name / "metrics/curves.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def held(out: Path, name: str, ranks: int) -> list[dict[str, float]]:
    return [json.loads((out / name / f"held-{rank}.json").read_text()) for rank in range(ranks)]


def case(name: str, parallel: Case | None = None, shape: Case | None = None, **more: Any) -> Case:
    top = {key: more.pop(key) for key in ("double", "fault", "sparse") if key in more}
    return {
        "name": name,
        "shape": shape or {},
        # Adam divides a gradient of rounding errors by itself: with its usual epsilon one process on one kind of
        # processor is 1e-5 from the same on another.
        "params": {"epsilon": 1e-5, **more, **({"parallel": parallel} if parallel else {})},
        **top,
    }


DDP, ZERO1, ZERO2 = (
    {"dp_replicate": 2},
    {"dp_replicate": 2, "shard_optimizer": True},
    {"dp_shard": 2, "reshard_after_forward": False},
)
ZERO3, TP = {"dp_shard": 2}, {"tp": 2}
SCHEMES = {"ddp": DDP, "zero-1": ZERO1, "zero-2": ZERO2, "zero-3": ZERO3, "tp": TP}
QWEN = {"arch": "qwen3", "tie_embeddings": False}
MUON = {"optimizer": "muon", "muon_variance": True, "weight_decay": 0.1, "cautious_decay": True, "ema": 0.9}
FINE: Case = {"max_steps": 20, "double": True}

GPT2 = {"arch": "gpt2", "kv_heads": 4}
BERT = {"arch": "bert", "kv_heads": 4, "token_types": 2, "head": "pretraining"}

SPEEDRUN = {"arch": "speedrun", "layers": 3, "logit_softcap": 15.0, "value_pattern": "-V", "tie_embeddings": False}
FURTHER = {"optimizer": "muon", "muon_equalise": "both", "muon_renormalise": True, "double": True}

ALONE = [case("speedrun", shape=SPEEDRUN, **FURTHER)]
ALONE += [case("gpt2", shape=GPT2, double=True, optimizer="schedule-free"), case("bert", shape=BERT, double=True)]
ALONE += [case("plain"), case("qwen", shape=QWEN), case("muon", **MUON), case("fine", **FINE)]
ALONE += [case(name, optimizer=name) for name in ("adafactor", "lion")]
ALONE += [case("fine micro", micro_batch=3, **FINE)]
TWO = [
    *(case(name, parallel) for name, parallel in SCHEMES.items()),
    *(case(f"qwen {name}", SCHEMES[name], QWEN) for name in ("zero-3", "tp")),
    *(case(f"muon {name}", SCHEMES[name], **MUON) for name in ("zero-1", "zero-3", "tp")),
    *(case(f"{optimizer} zero-3", ZERO3, optimizer=optimizer) for optimizer in ("adafactor", "lion")),
    *(case(f"fine {name}", SCHEMES[name], **FINE) for name in ("ddp", "tp")),
    case("fine micro zero-3", ZERO3, micro_batch=2, **FINE),
    # In float64: the gradients of key biases are 0 but for rounding, which AdamW makes as large as any other.
    case("gpt2 tp", TP, GPT2, double=True, optimizer="schedule-free", loss_chunk=8, recompute="selective"),
    *(case(f"speedrun {name}", SCHEMES[name], SPEEDRUN, **FURTHER) for name in ("zero-3", "tp")),
    case("bert ddp", DDP, BERT, double=True),
    case("bert tp", TP, BERT, double=True),
    case("local clip", ZERO3, fault="clip by the local norm"),
    case("lost heads", TP, QWEN, fault="heads are not added up"),
    case("lost gradients", DDP, fault="gradients are not added up"),
    case("lost weights", DDP, fault="weights are not added up"),
]


QUICK = {"qwen tp", "muon zero-3", "bert tp"}
"""Beside the plain schemes and the faults; the rest is slow."""
QUICK_ALONE = {"plain", "qwen", "muon", "bert"}
MORE = [each for each in TWO if each["name"] not in QUICK | set(SCHEMES) and "fault" not in each]


def named(*starts: str) -> list[Any]:
    """The cases of two ranks whose names begin so, the longer list of them marked slow."""
    found = [each["name"] for each in TWO if each["name"].startswith(starts) and "fault" not in each]
    slow = {each["name"] for each in MORE}
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the results of one process lie; those that slow tests alone ask for come there with `out`."""
    quick = [each for each in ALONE if each["name"] in QUICK_ALONE]
    return launch(quick, tmp_path_factory.mktemp("alone"), 1)


@pytest.fixture(scope="module")
def more_alone(alone: Path) -> Path:
    return launch([each for each in ALONE if each["name"] not in QUICK_ALONE], alone, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch([each for each in TWO if each not in MORE], tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(MORE, tmp_path_factory.mktemp("more"), 2)


@pytest.fixture
def out(name: str, request: pytest.FixtureRequest) -> Path:
    """Where the results of the case `name` lie; the slow ones are run for a slow test alone."""
    slow = name in {each["name"] for each in MORE}
    if slow:
        request.getfixturevalue("more_alone")
    return request.getfixturevalue("more" if slow else "two")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", [*SCHEMES, *named("qwen")])
def test_weights_after_five_clipped_steps_are_those_of_one_process(alone: Path, out: Path, name: str) -> None:
    reference = "qwen" if name.startswith("qwen") else "plain"
    assert apart(weights(out, name), weights(alone, reference)) <= 1e-5


@pytest.mark.parametrize("name", named("muon", "adafactor", "lion"))
def test_other_optimizers_see_whole_matrices(alone: Path, out: Path, name: str) -> None:
    reference = weights(alone, name.split()[0])
    assert apart(weights(out, name), reference) <= 1e-5
    assert apart(reference, weights(alone, "plain")) > 1e-3  # the optimizer does something else


@pytest.mark.parametrize("name", named("gpt2", "bert", "speedrun"))
def test_biases_other_heads_and_labels_are_spread_too(alone: Path, out: Path, name: str) -> None:
    assert apart(weights(out, name), weights(alone, name.split()[0])) <= 1e-9


@pytest.mark.parametrize(
    ("name", "reference"),
    [("local clip", "plain"), ("lost heads", "qwen"), ("lost gradients", "plain"), ("lost weights", "plain")],
)
def test_without_one_reduction_the_weights_differ(alone: Path, two: Path, name: str, reference: str) -> None:
    assert apart(weights(two, name), weights(alone, reference)) > 1e-4


@pytest.mark.parametrize("name", named("fine"))
def test_losses_in_float64_are_those_of_any_other_split(alone: Path, out: Path, name: str) -> None:
    reference = losses(alone, "fine")
    assert len(reference) == 20 and reference[-1] < reference[0] - 0.3
    for found in (losses(alone, "fine micro"), losses(out, name)):
        assert max(abs(a - b) for a, b in zip(found, reference, strict=True)) <= 1e-9


def test_each_level_of_zero_parts_what_it_says(alone: Path, two: Path) -> None:
    (whole,) = held(alone, "plain", 1)
    share = {
        name: [row[key] / whole[key] for row in held(two, name, 2) for key in ("weights", "state")] for name in SCHEMES
    }
    assert share["ddp"] == pytest.approx([1, 1, 1, 1])  # the control: nothing is parted
    assert share["zero-1"][::2] == [1, 1] and share["zero-1"][1::2] == pytest.approx([0.5, 0.5], abs=0.15)
    for name in ("zero-2", "zero-3"):
        assert share[name] == pytest.approx([0.5] * 4, abs=0.01)
    assert share["tp"] == pytest.approx([0.5] * 4, abs=0.02)  # norms are whole everywhere


FOUR = {
    "dp x tp": {"dp_replicate": 2, "tp": 2},
    "shard x tp": {"dp_shard": 2, "tp": 2},
    "replicate x shard": {"dp_replicate": 2, "dp_shard": 2},
}
OTHERS = {"shard x tp": ("qwen",), "dp x tp": ("muon",)}


@pytest.mark.slow
def test_products_of_parallelisms_equal_one_process(alone: Path, tmp_path: Path) -> None:
    cases = [case(f"{kind} {name}", parallel, QWEN if kind == "qwen" else {}, **(MUON if kind == "muon" else {}))
             for name, parallel in FOUR.items() for kind in ("plain", *OTHERS.get(name, ()))]  # fmt: skip
    out = launch(cases, tmp_path, 4)
    found = {each["name"]: apart(weights(out, each["name"]), weights(alone, each["name"].split()[0])) for each in cases}
    assert max(found.values()) <= 1e-5, found
    (whole,) = held(alone, "plain", 1)
    assert [row["weights"] / whole["weights"] for row in held(out, "plain shard x tp", 4)] == pytest.approx(
        [0.25] * 4, abs=0.02
    )
