"""The host does not wait for the device between two points of the curves."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from llmctl.train import loop, restoring
from llmctl.train.data import ExampleSource
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams
from llmctl.train.readings import Reading, Readings

READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu")
RECIPES: list[dict[str, Any]] = [
    {},
    {"muon_iteration": "polar-express", "muon_variance": True, "cautious_decay": True, "weight_decay": 0.1},
    {"optimizer": "adamw"},
    {"optimizer": "adamw8bit"},
    {"optimizer": "adafactor"},
    {"optimizer": "lion"},
    {"optimizer": "sgd"},
    {"optimizer": "schedule-free", "schedule": "constant"},
    {"ema": 0.9, "loss_chunk": 8, "micro_batch": 3, "recompute": "full"},
]


def make_run(make_context, make_model, make_examples, monkeypatch, **changes: Any) -> loop._Run:
    """A run on the CPU whose numbers have not arrived unless they are waited for, as on a busy GPU."""
    monkeypatch.setattr(Reading, "at_hand", property(lambda self: False))
    monkeypatch.setattr(Reading, "arrived", property(lambda self: False))
    values = TrainParams(**{"batch_size": 4, "max_steps": 50, "lr": 0.01, **changes})
    source = ExampleSource(make_examples(20), 32, values)
    compute = loop.Compute.of(values)
    return loop._Run(make_context(), make_model(), CausalLM(), source, values, None, compute, 50)


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_no_step_reads_a_number_back(make_context, make_model, make_examples, monkeypatch, changes) -> None:
    run = make_run(make_context, make_model, make_examples, monkeypatch, **changes)
    monkeypatch.setattr("llmctl.train.eight_bit.SMALLEST", 1024)
    run.update()  # state is made in the first step
    counted: list[str] = []
    for name in READS:
        original = getattr(torch.Tensor, name)

        def noted(self, *arguments, original=original, name=name, **named):
            counted.append(name)
            return original(self, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, noted)
    for _ in range(4):
        run.update()
    assert counted == [] and len(run.readings.waiting) == 5
    run.log()
    assert counted == ["tolist"] * 5  # the control: at a point of the curve it reads what has gathered
    assert run.curve[0]["loss"] > 0 and not run.readings.waiting


def test_numbers_are_taken_in_order_when_they_have_arrived(monkeypatch) -> None:
    there: set[int] = set()
    monkeypatch.setattr(Reading, "arrived", property(lambda self: self.step in there))
    taken: list[tuple[int, float]] = []
    readings = Readings(lambda reading, sums: taken.append((reading.step, sums["loss"])))
    for step in range(3):
        readings.add(Reading(step, 1, {"loss": torch.tensor(float(step))}))
    there |= {1, 2}
    readings.look()
    assert taken == []  # those behind wait for the first
    there |= {0}
    readings.look()
    assert taken == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_what_is_not_finite_is_noticed_before_anything_is_saved(
    make_context, make_model, make_examples, monkeypatch
) -> None:
    from llmctl.errors import StageError

    run = make_run(make_context, make_model, make_examples, monkeypatch)
    run.update()
    run.model.norm.weight.data[0] = float("nan")
    for _ in range(3):
        run.update()
    for late in (partial(restoring.save, run), run.log):
        with pytest.raises(StageError, match="at step [23]"):
            late()
    assert not run.checkpoints.steps()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_the_profiler_sees_no_wait_between_points(make_context, make_model, make_examples, changes) -> None:
    from torch.profiler import ProfilerActivity, profile

    values = TrainParams(**{"batch_size": 4, "max_steps": 50, "lr": 0.01, **changes})
    source = ExampleSource(make_examples(20), 32, values)
    run = loop._Run(make_context(), make_model(), CausalLM(), source, values, None, loop.Compute.of(values), 50)
    for _ in range(3):
        run.update()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            run.update()
    waits = [event.name for event in seen.events() if "Synchronize" in event.name and "Event" not in event.name]
    # The profiler itself waits once, when it ends.
    assert len(waits) <= 1, waits
