"""A model in stages learns what a whole one learns, at the cost that its schedule has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmctl.errors import UsageError
from llmctl.nn.config import TRAITS, ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.train.parallel import ParallelParams, bubble_share, schedule_misfit, sequences_at_once
from llmctl.train.params import TrainParams
from llmctl.train.pipeline_cut import cut, in_flight
from llmctl.train.pipeline_stages import require_stages

Case = dict[str, Any]
Launch = Callable[..., Path]
FOUR = {"layers": 4}
UNTIED = {"arch": "qwen3", "tie_embeddings": False, **FOUR}
SCHEDULES: dict[str, Case] = {
    "gpipe": {"pp": 2, "pp_schedule": "gpipe"},
    "1f1b": {"pp": 2},
    "interleaved": {"pp": 2, "pp_schedule": "interleaved", "virtual_stages": 2},
}
GROUPS = {"head": {"lr": 0.01}, "embedding": {"lr": 0.02}}
"""Each is on one of the stages alone."""
FAMILIES: dict[str, Case] = {
    "gpt2": {"arch": "gpt2"},
    "t5 table": {"arch": "lamda"},
    "alibi": {"arch": "bloom"},
    "masked": {"arch": "bert", "token_types": 2},
}


def case(name: str, parallel: Case | None = None, shape: Case = FOUR, **more: Any) -> Case:
    fault = {"fault": more.pop("fault")} if "fault" in more else {}
    double = {"double": more.pop("double")} if "double" in more else {}
    parallels = {"parallel": parallel} if parallel else {}
    # Adam divides a gradient of rounding errors by itself: with its usual epsilon one process is 8e-5 from itself with
    # another micro_batch (1e-13 in float64).
    params = {"micro_batch": 1, "epsilon": 1e-5, **more, **parallels}
    return {"name": name, "shape": shape, "params": params, **fault, **double}


TWO = [
    *(case(name, parallel) for name, parallel in SCHEDULES.items()),
    case("untied 1f1b", SCHEDULES["1f1b"], UNTIED),
    case("muon interleaved", SCHEDULES["interleaved"], optimizer="muon", weight_decay=0.1, ema=0.9, recompute="full"),
    case("untied groups", SCHEDULES["1f1b"], UNTIED, groups=GROUPS),
    case("fine", SCHEDULES["1f1b"], max_steps=20, double=True),
    case("resumed", SCHEDULES["gpipe"], max_steps=2),
    case("resumed", SCHEDULES["interleaved"], max_steps=3),  # goes on from there
    case("not joined", SCHEDULES["1f1b"], fault="tied gradients are not added up"),
    case("own norm", SCHEDULES["1f1b"], fault="clip by the stage's norm"),
    *({"name": name, "piece": "stages", "shape": shape} for name, shape in FAMILIES.items()),
    {"name": "t5 table twice", "piece": "stages", "shape": {"arch": "lamda"}, "schedule": "interleaved", "virtual": 2},
    *(
        {"name": f"times {schedule} {sequential}", "piece": "timeline", "schedule": schedule, "sequential": sequential}
        for schedule, sequential in (("gpipe", False), ("1f1b", False), ("gpipe", True))
    ),
]
ALONE = [case("plain"), case("untied", shape=UNTIED), case("muon", optimizer="muon", weight_decay=0.1, ema=0.9)]
ALONE += [case("groups", shape=UNTIED, groups=GROUPS)]
ALONE += [case("fine alone", max_steps=20, double=True)]


QUICK = {*SCHEDULES, "not joined", "own norm", "t5 table"}
"""Of two ranks; the rest is run for slow tests alone."""


@pytest.fixture(scope="module")
def alone(launch_ranks: Launch) -> Path:
    return launch_ranks(ALONE[:1], 1)


@pytest.fixture(scope="module")
def two(launch_ranks: Launch) -> Path:
    return launch_ranks([each for each in TWO if each["name"] in QUICK], 2)


@pytest.fixture(scope="module")
def more_alone(launch_ranks: Launch) -> Path:
    return launch_ranks(ALONE[1:], 1)


@pytest.fixture(scope="module")
def more(launch_ranks: Launch) -> Path:
    return launch_ranks([each for each in TWO if each["name"] not in QUICK], 2)


def weights(out: Path, name: str) -> torch.Tensor:
    return torch.cat([value.flatten() for value in torch.load(out / name / "weights.pt").values()])


def apart(out: Path, name: str, other: Path, reference: str) -> float:
    return float((weights(out, name) - weights(other, reference)).abs().max())


def piece(out: Path, name: str, ranks: int = 2) -> list[Any]:
    return [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_after_five_clipped_steps_are_those_of_one_process(alone: Path, two: Path, name: str) -> None:
    assert apart(two, name, alone, "plain") <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference"), [("untied 1f1b", "untied"), ("untied groups", "groups"), ("muon interleaved", "muon")]
)
def test_those_of_other_shapes_and_optimizers_are_too(more_alone: Path, more: Path, name: str, reference: str) -> None:
    assert apart(more, name, more_alone, reference) <= 1e-5


@pytest.mark.parametrize("name", ["not joined", "own norm"])
def test_without_one_reduction_the_weights_differ(alone: Path, two: Path, name: str) -> None:
    assert apart(two, name, alone, "plain") > 1e-4


@pytest.mark.slow
def test_losses_in_float64_are_those_of_one_process(more_alone: Path, more: Path) -> None:
    places = (more_alone / "fine alone", more / "fine")
    rows = [(place / "metrics/curves.jsonl").read_text() for place in places]
    one, other = ([json.loads(line)["loss"] for line in text.splitlines()] for text in rows)
    assert len(one) == 20
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1e-9
    assert apart(more, "fine", more_alone, "fine alone") <= 1e-9


@pytest.mark.slow
def test_a_checkpoint_of_stages_goes_on_in_others_and_whole(alone: Path, more: Path, launch_ranks: Launch) -> None:
    """Two steps in two stages, one in four, two in one process."""
    last = launch_ranks([], 1)
    shutil.copytree(more / "resumed", last / "resumed")
    launch_ranks([case("resumed", max_steps=5)], 1, last)
    assert apart(last, "resumed", alone, "plain") <= 1e-5
    steps = [json.loads(line)["step"] for line in (last / "resumed/metrics/curves.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, "t5 table twice")],
)
def test_stages_of_every_kind_compute_what_the_whole_does(name: str, request: pytest.FixtureRequest) -> None:
    out = request.getfixturevalue("two" if name in QUICK else "more")
    for found in piece(out, name):
        assert found["gradient"] <= 1e-12 and found["norm"] <= 1e-12 and found["evaluation"] <= 1e-9  # float64
        assert found["subset"] and found["back"]
    first, last = piece(out, name)
    assert set(first["names"]) | set(last["names"]) == set(first["whole"])
    shared = set(first["names"]) & set(last["names"])
    assert shared == ({"embedding.weight", "relative.weight"} & set(first["whole"]))


def overlap(times: list[list[list[float]]]) -> float:
    """Seconds in which both ranks compute."""
    first, second = times
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)


@pytest.mark.slow
def test_stages_compute_at_the_same_time(more: Path) -> None:
    for schedule in ("gpipe", "1f1b"):
        assert overlap(piece(more, f"times {schedule} False")) > 0.04
    # The control: one micro-batch after another leaves every stage but one idle.
    assert overlap(piece(more, "times gpipe True")) == 0


Act = tuple[str, int, int]
"""F or B, number of the stage, number of the micro-batch."""


def acts(order: dict[int, list[Any]]) -> dict[int, list[Act]]:
    """What each rank computes, of torch's own form of it."""
    found = {rank: [act for act in given if act is not None and act.is_compute_op] for rank, given in order.items()}
    return {
        rank: [(act.computation_type.value, act.stage_index, act.microbatch_index) for act in given]
        for rank, given in found.items()
    }


def one_forward_one_backward(ranks: int, parts: int) -> dict[int, list[Act]]:
    """As the paper has it; what torch says of its own is wrong from the second rank on (it counts from 1F1)."""
    found: dict[int, list[Act]] = {}
    for rank in range(ranks):
        ahead = min(parts, ranks - rank)
        found[rank] = [("F", rank, part) for part in range(ahead)]
        for part in range(parts):
            found[rank] += [("B", rank, part)] + ([("F", rank, part + ahead)] if part + ahead < parts else [])
    return found


def bubble(todo: dict[int, list[Act]], ranks: int, virtual: int) -> float:
    """Waiting over computing of a schedule played through: a stage's forward takes 1, its backward 2."""
    ready: dict[Act, float] = {}
    at, last = dict.fromkeys(todo, 0.0), ranks * virtual - 1
    while any(todo.values()):
        before = len(ready)
        for rank, actions in todo.items():
            while actions:
                kind, stage, part = actions[0]
                needs = [("F", stage - 1, part)] if stage and kind == "F" else []
                if kind == "B":
                    needs = [("F", stage, part)] + ([("B", stage + 1, part)] if stage < last else [])
                if any(need not in ready for need in needs):
                    break
                start = max([at[rank], *(ready[need] for need in needs)])
                at[rank] = ready[actions.pop(0)] = start + (1 if kind == "F" else 2)
        assert len(ready) > before, "every rank waits for another"
    computing = 3 * virtual * len({part for _, _, part in ready})
    return max(at.values()) / computing - 1


@pytest.mark.parametrize(("ranks", "parts", "virtual"), [(2, 4, 1), (4, 8, 1), (8, 32, 1), (4, 8, 2), (8, 32, 2)])
def test_bubble_and_what_is_kept_are_those_of_the_schedule_played_through(ranks: int, parts: int, virtual: int) -> None:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        stages = [
            PipelineStage(torch.nn.Identity(), index, ranks * virtual, torch.device("cpu"))
            for index in range(0, ranks * virtual, ranks)
        ]
        if virtual > 1:
            orders = [acts(ScheduleInterleaved1F1B(stages, parts).pipeline_order)]
        else:
            orders = [acts(ScheduleGPipe(stages[0], parts).pipeline_order), one_forward_one_backward(ranks, parts)]
    finally:
        dist.destroy_process_group()
    schedules = ["gpipe", "1f1b"] if virtual == 1 else ["interleaved"]
    for schedule, order in zip(schedules, orders, strict=True):
        for rank, actions in order.items():
            change = np.cumsum([1 if kind == "F" else -1 for kind, _, _ in actions])
            assert change.max() / virtual == in_flight(schedule, ranks, rank, parts, virtual)
        assert bubble(order, ranks, virtual) == pytest.approx(bubble_share(ranks, parts, virtual))


def test_bubble_share_of_the_paper() -> None:
    assert [bubble_share(8, 32), bubble_share(8, 32, 2)] == pytest.approx([0.21875, 0.109375])


def test_the_last_stage_has_fewer_blocks_where_the_head_is_large() -> None:
    shape = {"arch": "llama", "dim": 64, "layers": 12, "heads": 4, "context": 32}
    small, large = (ModelConfig(vocab_size=size, **shape) for size in (64, 4096))
    assert [(s.start, s.stop) for s in cut(small, 4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    spans = [s.stop - s.start for s in cut(large, 4)]
    assert sum(spans) == 12 and spans[-1] < 3 and max(spans) <= 4
    with pytest.raises(UsageError, match="12 layers cannot be cut into 13 stages"):
        cut(small, 13)


def test_what_cannot_be_cut_is_refused() -> None:
    shape = {"vocab_size": 50, "dim": 32, "layers": 2, "heads": 4, "context": 16}
    with pytest.raises(UsageError, match="encoder-decoder"):
        require_stages(Transformer(ModelConfig(arch="t5", **shape)))
    with pytest.raises(UsageError, match="speedrun cannot be cut"):
        require_stages(Transformer(ModelConfig(arch="speedrun", **shape)))
    smeared = ModelConfig(arch="llama", traits=replace(TRAITS["llama"], smear=True), **shape)
    with pytest.raises(UsageError, match="llama cannot be cut"):
        require_stages(Transformer(smeared))
    strange = Transformer(ModelConfig(arch="llama", **shape))
    strange.further = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="`further` cannot be cut"):
        require_stages(strange)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"parallel": {"pp": 2, "tp": 2}}, "pp goes with dp_replicate and cp"),
        ({"parallel": {"pp": 2, "virtual_stages": 2}}, "`interleaved` needs 2"),
        ({"parallel": {"pp": 1, "virtual_stages": 2, "pp_schedule": "interleaved"}}, "needs pp above 1"),
        ({"parallel": {"pp": 4}, "micro_batch": 4, "batch_size": 8}, "2 micro-batches per step are too few for pp 4"),
        ({"parallel": {"pp": 2}, "compile": True}, "compile does not go with pp"),
        ({"parallel": {"cp": 2}, "attention": "flex"}, "flex cannot reach across"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_parameters(values: Case, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainParams(**values)


def test_micro_batches_that_nobody_gives_are_four_per_process() -> None:
    assert TrainParams(batch_size=64, parallel=ParallelParams(pp=2)).micro_batches == 8
    assert TrainParams(batch_size=64, parallel=ParallelParams(pp=2, dp_replicate=4)).micro_batches == 8
    assert [sequences_at_once(share, 2) for share in (6, 12, 16, 64)] == [1, 1, 2, 8]
    assert schedule_misfit("interleaved", 4, 9) and not schedule_misfit("interleaved", 4, 8)


@pytest.mark.slow
def test_stages_in_the_middle(launch_ranks: Launch) -> None:
    shapes = {"tied": {}, "untied": {"arch": "qwen3", "tie_embeddings": False}, "t5 table": {"arch": "lamda"}}
    found = launch_ranks([{"name": name, "piece": "stages", "shape": shape} for name, shape in shapes.items()], 4)
    for name in shapes:
        for row in piece(found, name, 4):
            assert row["gradient"] <= 1e-12 and row["evaluation"] <= 1e-9 and row["subset"] and row["back"]
        assert [len([n for n in row["names"] if n.startswith("embedding")]) for row in piece(found, name, 4)] == (
            [1, 0, 0, 0] if name == "untied" else [1, 0, 0, 1]
        )


@pytest.mark.slow
def test_dp_and_cp_times_pp_equal_one_process(alone: Path, launch_ranks: Launch) -> None:
    """In float32, whose rounding Adam amplifies, as far as is promised of dp times pp; in float64 to its digits."""
    both = {f"{d} x pp": {d: 2, **SCHEDULES["1f1b"]} for d in ("dp_replicate", "cp")}
    fine = [case(f"{name}, fine", parallel, double=True) for name, parallel in both.items()]
    found = launch_ranks([case("dp_replicate x pp", both["dp_replicate x pp"]), *fine], 4)
    one = launch_ranks([case("fine", double=True)], 1)
    assert apart(found, "dp_replicate x pp", alone, "plain") <= 1e-5
    for name in both:
        assert apart(found, f"{name}, fine", one, "fine") <= 1e-10
