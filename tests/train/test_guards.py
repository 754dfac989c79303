"""Steps that are left out, weights that go back, and the means of weights."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from llmctl.errors import StageError, TempFail
from llmctl.train import guards, loop, storage
from llmctl.train.averages import Averages
from llmctl.train.data import ExampleSource
from llmctl.train.device import LossScale
from llmctl.train.guards import Guard
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM
from llmctl.train.optimizers import Optimizers
from llmctl.train.params import TrainParams
from llmctl.train.validation import mean_loss


def params(**changes: Any) -> TrainParams:
    values = {"batch_size": 4, "max_steps": 12, "warmup_steps": 2, "save_every": 4, "log_every": 5, "lr": 0.01}
    return TrainParams(**{**values, **changes})


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Breaks(CausalLM):
    """Multiplies the loss of given batches, told apart by their first token."""

    def __init__(self, source: ExampleSource, bad: dict[int, float]) -> None:
        super().__init__()
        object.__setattr__(self, "bad", {self.key(source.micro_batches(step)[0]): by for step, by in bad.items()})

    def key(self, batch: Any) -> tuple[int, ...]:
        return tuple(batch.tokens.flatten().tolist())

    def loss(self, model, batch):
        loss, further = super().loss(model, batch)
        return loss * self.bad.get(self.key(batch), 1.0), further


def run(make_context, make_model, examples, name: str, values: TrainParams, bad: dict[int, float], stops=()) -> tuple:
    for stop in stops:
        source = ExampleSource(examples, 32, values)
        with pytest.raises(TempFail):
            fit(make_context(name, stop), make_model(), Breaks(source, bad), source, values)
    source, model, ctx = ExampleSource(examples, 32, values), make_model(3 if stops else 0), make_context(name)
    final = fit(ctx, model, Breaks(source, bad), source, values)
    final.pop("tokens_per_s", None)
    return weights(model), final, ctx


@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_a_step_that_is_not_finite_can_be_skipped(make_context, make_model, make_examples, by: float) -> None:
    examples, values = make_examples(60), params(on_nonfinite="skip")
    found, final, ctx = run(make_context, make_model, examples, "skip", values, {5: by, 6: by})
    assert final["skipped"] == 2 and final["steps"] == 12 and found.isfinite().all()
    assert math.isfinite(final["loss.train"])
    logged = [fields["value"] for kind, fields in ctx.events if kind == "metric" and fields["name"] == "skipped"]
    assert logged == [0, 2, 2]
    stopped, again, _ = run(make_context, make_model, examples, "again", values, {5: by, 6: by}, [3, 3, 1])
    assert torch.equal(found, stopped) and final == again
    other = run(make_context, make_model, examples, "none", values, {})
    assert other[1]["skipped"] == 0 and not torch.equal(other[0], found)


@pytest.mark.parametrize("late", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stops", [[], [3, 2], [6], [5, 0, 4]])
def test_weights_can_go_back_to_the_last_checkpoint(
    make_context, make_model, make_examples, monkeypatch, stops, late
) -> None:
    """`late`: also to one that is still being written."""
    write = storage.save_file
    monkeypatch.setattr(storage, "save_file", lambda *given: (time.sleep(late), write(*given)))
    examples, values = make_examples(60), params(on_nonfinite="rewind")
    name = "-".join(map(str, ["rewind", *stops]))
    found, final, ctx = run(make_context, make_model, examples, name, values, {6: math.nan}, stops)
    assert final["rewound"] == 1 and final["steps"] == 12
    # Steps 0 to 3, then from 7 on: by hand, with the batches between left out.
    source, model = ExampleSource(examples, 32, values), make_model()
    by_hand = loop._Run(
        make_context(f"hand-{name}"), model, CausalLM(), source, values, None, loop.Compute.of(values), 12
    )
    while by_hand.step < 12:
        by_hand.update()
        if by_hand.step == 4:
            by_hand.step = 7
    assert torch.equal(weights(model), found)


def test_a_spike_is_measured_against_the_median(make_context, make_model, make_examples) -> None:
    examples = make_examples(200)
    values = params(max_steps=20, spike_factor=3.0, lr=1e-3)
    found, final, _ = run(make_context, make_model, examples, "spike", values, {12: 50.0, 2: 50.0})
    assert final["skipped"] == 1  # the early one comes before there is a median to compare with
    rewound = run(
        make_context, make_model, examples, "back", params(**{**values.model_dump(), "on_spike": "rewind"}), {14: 50.0}
    )
    assert rewound[1]["rewound"] == 1
    unguarded = run(make_context, make_model, examples, "off", params(max_steps=20, lr=1e-3), {12: 50.0, 2: 50.0})
    assert "skipped" not in unguarded[1] and not torch.equal(found, unguarded[0])


def test_a_run_that_only_skips_has_diverged(make_context, make_model, make_examples) -> None:
    values, examples = params(on_nonfinite="skip", max_steps=40), make_examples(200)
    with pytest.raises(StageError, match="11 steps in a row were left out, up to step 15"):
        run(make_context, make_model, examples, "diverged", values, dict.fromkeys(range(4, 40), math.nan))


def test_the_guards_verdicts() -> None:
    guard = Guard(params(spike_factor=2.0, on_nonfinite="rewind"), scaled=True)
    assert [guard.judge(n, 1.0, 1.0) for n in range(guards.FEWEST)] == ["take"] * guards.FEWEST
    assert guard.judge(9, 2.1, 1.0) == "skip" and guard.judge(9, 1.9, 1.0) == "take"
    assert guard.judge(10, 1.0, math.inf) == "overflow" and guard.judge(11, math.nan, math.nan) == "rewind"
    assert guard.counts == {"overflows": 1, "skipped": 1, "rewound": 1} and guard.before
    other = Guard(params(spike_factor=2.0, on_nonfinite="rewind"), scaled=True)
    other.load(guard.state())
    assert other.state() == guard.state()
    plain = Guard(params(), scaled=False)
    assert not plain.before and plain.judge(0, 1e9, 1.0) == "take"
    with pytest.raises(StageError, match="the loss is 1 and the gradient norm inf at step 3"):
        plain.judge(2, 1.0, math.inf)


def test_fp16_overflows_skip_the_step_and_halve_the_scale(make_context, make_model, make_examples, monkeypatch) -> None:
    monkeypatch.setattr(LossScale, "START", 2.0**33)
    values = params(precision="fp16", max_steps=30)
    found, final, ctx = run(make_context, make_model, make_examples(60), "fp16", values, {})
    assert 0 < final["overflows"] < 20
    scales = [fields["value"] for kind, fields in ctx.events if kind == "metric" and fields["name"] == "loss_scale"]
    assert scales[-1] == 2.0 ** (33 - final["overflows"])
    assert found.isfinite().all()
    losses = [fields["value"] for kind, fields in ctx.events if kind == "metric" and fields["name"] == "loss"]
    assert losses[-1] < losses[0]  # from the step on that fits, it learns


def test_the_loss_scale_follows_torchs(monkeypatch) -> None:
    monkeypatch.setattr(LossScale, "INTERVAL", 3)
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for overflowed in (True, True, False, False, False, False, True, False, False, False):
        theirs.scale(weight.sum()).backward()
        if overflowed:
            weight.grad.fill_(math.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(overflowed)
        assert ours.scale == theirs.get_scale()


def test_bf16_and_fp16_end_within_one_percent(make_context, make_model, make_examples) -> None:
    examples, ends = make_examples(40), {}
    for precision in ("float32", "bf16", "fp16"):
        values = params(precision=precision, max_steps=30, lr=3e-3)
        model, held_out = make_model(), ExampleSource(make_examples(16, seed=7), 32, values)
        final = fit(
            make_context(precision),
            model,
            CausalLM(),
            ExampleSource(examples, 32, values),
            values,
            lambda m, c, held_out=held_out: mean_loss(m, CausalLM(), held_out.sweep(), c),
        )
        ends[precision] = final["loss.validation"]
    assert ends["bf16"] == pytest.approx(ends["float32"], rel=0.01)
    assert ends["fp16"] == pytest.approx(ends["float32"], rel=0.01)


def test_half_precision_models_are_trained_in_float32(make_context, make_model, make_examples) -> None:
    model, values = make_model().bfloat16(), params(max_steps=1)
    fit(make_context(), model, CausalLM(), ExampleSource(make_examples(8), 32, values), values)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_mean_of_the_weights_equals_its_formula_and_becomes_the_model(
    make_context, make_model, make_examples
) -> None:
    examples, values = make_examples(40), params(ema=0.8, max_steps=20)
    source, model = ExampleSource(examples, 32, values), make_model()
    run_ = loop._Run(make_context("hand"), model, CausalLM(), source, values, None, loop.Compute.of(values), 20)
    expected = weights(model).double()
    for step in range(20):
        run_.update()
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights(model).double()
    last = weights(model)
    trained, seen = make_model(), []

    def validate(model, compute):
        seen.append(weights(model))
        return {}

    fit(make_context(), trained, CausalLM(), ExampleSource(examples, 32, values), values, validate)
    assert (weights(trained) - expected).abs().max() <= 1e-6
    assert torch.equal(seen[-1], weights(trained))  # what is measured is what is saved
    assert (last - expected).abs().max() > 1e-3


def test_looking_at_the_mean_leaves_the_weights_as_they_were(make_model) -> None:
    for changes in ({"ema": 0.9}, {"optimizer": "schedule-free", "schedule": "constant"}):
        model, values = make_model(), params(**changes)
        optimizers = Optimizers(model, values)
        averages = Averages(model, optimizers, values.ema)
        for step in range(3):
            model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
            optimizers.step(1.0)
            averages.update(step)
        before = weights(model)
        with averages.swapped():
            inside = weights(model)
        assert torch.equal(weights(model), before) and not torch.equal(inside, before)
        averages.finish()
        assert torch.equal(weights(model), inside)
