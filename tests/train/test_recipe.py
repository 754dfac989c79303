"""The pieces of the pre-training recipe: Muon's further steps, schedules of momentum and decay, rates by group.

The formulas here are written matrix by matrix with loops, from the papers' definitions.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmctl.errors import TempFail, UsageError
from llmctl.train.data import ExampleSource
from llmctl.train.loop import fit
from llmctl.train.muon import ITERATIONS, Muon, equalised
from llmctl.train.objectives import CausalLM
from llmctl.train.optimizers import Optimizers
from llmctl.train.params import TrainParams
from llmctl.train.schedule import decay_factor, momentum_at

STEPS = 20


def gradients(shape: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows and columns are of unlike size, so that each axis counts."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    scales = torch.linspace(0.2, 3, shape[0])[:, None] * torch.linspace(0.5, 2, shape[1])
    return start, [torch.randn(shape, generator=generator) * scales for _ in range(STEPS)]


def level(rows: torch.Tensor) -> torch.Tensor:
    """Every row scaled to the root mean square of all rows' norms."""
    norms = [float(row.norm()) for row in rows]
    target = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
    return torch.stack([row * target / norm for row, norm in zip(rows, norms, strict=True)])


def polar(x: torch.Tensor) -> torch.Tensor:
    x = x / (x.norm() * 1.02)
    for a, b, c in ITERATIONS["polar-express"]:
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


def formula(
    w: torch.Tensor,
    grads: list[torch.Tensor],
    *,
    equalise: str = "none",
    renormalise: bool = False,
    variance: bool = False,
    cautious: bool = False,
    momenta: list[float] | None = None,
    decays: list[float] | None = None,
) -> torch.Tensor:
    lr, rows, columns = 0.02, *w.shape
    buffer, second = torch.zeros_like(w), torch.zeros(rows if rows >= columns else columns, dtype=w.dtype)
    for step, grad in enumerate(grads):
        mu = 0.95 if momenta is None else momenta[step]
        decay = 0.1 if decays is None else decays[step]
        buffer = mu * buffer + (1 - mu) * grad
        x = mu * buffer + (1 - mu) * grad
        x = level(x) if equalise in ("rows", "both") else x
        x = level(x.T).T if equalise in ("columns", "both") else x
        x = polar(x)
        if renormalise:
            x = x * math.sqrt(min(rows, columns)) / x.norm()
        if variance:
            squares = x.square().mean(1 if rows >= columns else 0)
            second = 0.95 * second + 0.05 * squares
            scaled = x / second.sqrt()[:, None] if rows >= columns else x / second.sqrt()
            x = scaled * x.norm() / scaled.norm()
        share = (w * x > 0).to(w.dtype) if cautious else 1.0
        w = w - lr * decay * share * w - lr * max(1, rows / columns) ** 0.5 * x
    return w


PIECES = [
    {"equalise": "rows"},
    {"equalise": "columns"},
    {"equalise": "both"},
    {"renormalise": True},
    {"variance": True},
    {"cautious": True},
    {"equalise": "rows", "renormalise": True, "variance": True, "cautious": True},
]


@pytest.mark.parametrize("shape", [(16, 24), (32, 8)])
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_each_piece_of_muon_equals_its_formula_over_20_steps(shape: tuple[int, int], pieces: dict) -> None:
    start, grads = gradients(shape)
    weight = nn.Parameter(start.double())  # in float64, as the formulas: float32's rounding alone adds up to 2e-6
    muon = Muon([weight], lr=0.02, weight_decay=0.1, iteration="polar-express", **pieces)
    for grad in grads:
        weight.grad = grad.double()
        muon.step()
    expected = formula(start.double(), [grad.double() for grad in grads], **pieces)
    assert (weight - expected).abs().max() <= 1e-9
    # Control: without the pieces the weights are elsewhere.
    assert (formula(start.double(), [grad.double() for grad in grads]) - expected).abs().max() > 1e-3


class Net(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*weight.T.shape, bias=False)
        self.embedding, self.value_embedding = (nn.Embedding(*weight.shape) for _ in range(2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(weight)


def test_momentum_and_decay_follow_their_schedules_through_the_optimizers() -> None:
    start, grads = gradients((16, 24))
    params = TrainParams(
        weight_decay=0.1, cautious_decay=True, decay_schedule="cosine", momentum_warmup=8, momentum_end=0.7,
        muon_iteration="polar-express", decay_share=0.4, lr=0.02, clip=0,
    )  # fmt: skip
    net = Net(start.double()).double()
    optimizers = Optimizers(net, params)
    momenta, decays = [], []
    for step, grad in enumerate(grads):
        momenta.append(
            momentum_at(step, total=STEPS, peak=0.95, start=0.85, warmup=8, end=0.7, decay_share=params.decay_share)
        )
        decays.append(0.1 * decay_factor(step, total=STEPS, schedule="cosine"))
        net.layer.weight.grad = grad.double()
        optimizers.step(1.0, momenta[-1], decays[-1] / 0.1)
    expected = formula(start.double(), [g.double() for g in grads], cautious=True, momenta=momenta, decays=decays)
    assert (net.layer.weight - expected).abs().max() <= 1e-9
    constant = formula(start.double(), [g.double() for g in grads], cautious=True)
    assert (constant - expected).abs().max() > 1e-3


def test_momentum_rises_holds_and_falls() -> None:
    at = lambda step, **kw: momentum_at(  # noqa: E731
        step, **{"total": 100, "peak": 0.95, "start": 0.85, "warmup": 20, "end": 0.75, "decay_share": 0.4, **kw}
    )
    assert [at(step) for step in (0, 10, 20, 60, 80, 100)] == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.85, 0.75])
    assert at(99, end=None) == at(5, warmup=0, end=None) == 0.95
    assert at(95, total=100, warmup=200, end=0.75) == pytest.approx(0.775)  # where both overlap, the smaller
    assert [decay_factor(step, total=8, schedule="linear") for step in (0, 2, 8, 9)] == [1, 0.75, 0, 0]
    assert [decay_factor(step, total=8, schedule="cosine") for step in (0, 4, 8)] == pytest.approx([1, 0.5, 0])
    assert decay_factor(7, total=8, schedule="constant") == 1


def adam(w: torch.Tensor, grads: list[torch.Tensor], lr: float, b1: float, b2: float, decay: float) -> torch.Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, grad in enumerate(grads, start=1):
        w = w * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        w = w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8)
    return w


def test_groups_have_their_own_rates_betas_and_decay() -> None:
    start, grads = gradients((16, 24))
    groups = {"embedding": {"beta2": 0.99}, "value_embedding": {"lr": 0.01, "beta1": 0.8, "weight_decay": 0.2}}
    params = TrainParams(lr=0.02, embedding_lr=3e-3, groups=groups, scale_lr_with_batch="sqrt", batch_size=64)
    net = Net(start.double()).double()
    optimizers = Optimizers(net, params)
    for grad in grads:
        net.embedding.weight.grad, net.value_embedding.weight.grad = grad.double(), grad.double()
        optimizers.step(1.0)
    found = (net.embedding.weight, net.value_embedding.weight)
    values = (6e-3, 0.9, 0.99, 0.0), (0.02, 0.8, 0.99, 0.2)  # all rates doubled by the batch
    for weight, (lr, b1, b2, decay) in zip(found, values, strict=True):
        expected = adam(start.double(), [grad.double() for grad in grads], lr, b1, b2, decay)
        assert (weight - expected).abs().max() <= 1e-9
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("optimizer", "groups", "message"),
    [
        ("muon", {"values": {"lr": 0.1}}, "names `values`, which is in no parameter's name"),
        ("muon", {"layer": {"beta1": 0.8}}, "groups.layer: the optimizer of matrix parameters has no beta1"),
        ("muon", {"matrix": {"beta2": 0.8}}, "groups.matrix: the optimizer of matrix parameters has no beta2"),
        ("sgd", {"embedding": {"beta2": 0.8}}, "groups.embedding: the optimizer of embedding parameters has no beta2"),
    ],
)
def test_groups_that_would_do_nothing_are_refused(optimizer: str, groups: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Optimizers(Net(torch.ones(4, 4)), TrainParams(optimizer=optimizer, groups=groups, muon_variance=False))


def test_equalised_rows_have_one_norm_and_keep_their_directions() -> None:
    matrices = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = equalised(matrices, 2)
    assert found.norm(dim=2).std(dim=1).max() < 1e-12
    torch.testing.assert_close(found.norm(dim=(1, 2)), matrices.norm(dim=(1, 2)))
    torch.testing.assert_close(torch.cosine_similarity(found, matrices, dim=2), torch.ones(3, 8).double())
    assert equalised(torch.zeros(1, 2, 2), 1).abs().max() == 0


def test_a_run_follows_momentum_and_decay(make_context, make_model, make_examples, monkeypatch) -> None:
    taken: list[tuple[float, float, float]] = []
    step = Optimizers.step

    def spied(self: Optimizers, *given: float) -> None:
        step(self, *given)
        group = self.all[0].param_groups[0]
        taken.append((group["lr"], group["momentum"], group["weight_decay"]))

    monkeypatch.setattr(Optimizers, "step", spied)
    params = TrainParams(
        max_steps=8, batch_size=2, schedule="constant", warmup_steps=0, momentum_warmup=4, momentum_end=0.75,
        decay_share=0.5, weight_decay=0.1, decay_schedule="linear", threads=1, save_every=0,
    )  # fmt: skip
    fit(make_context(), make_model(), CausalLM(), ExampleSource(make_examples(8), 32, params), params)
    rates, momenta, decays = zip(*taken, strict=True)
    assert set(rates) == {0.02}
    assert momenta == pytest.approx((0.85, 0.875, 0.9, 0.925, 0.95, 0.9, 0.85, 0.8))
    assert decays == pytest.approx([0.1 * (1 - step / 8) for step in range(8)])


def test_a_resumed_run_of_speedrun_is_bit_identical(make_context, make_model, make_examples) -> None:
    shape = {"arch": "speedrun", "value_pattern": "-V", "qk_gain": 1.2, "tie_embeddings": False}
    params = TrainParams(
        max_steps=6, batch_size=2, momentum_warmup=4, momentum_end=0.8, muon_equalise="rows", muon_renormalise=True,
        muon_variance=True, muon_iteration="polar-express", decay_schedule="cosine", weight_decay=0.1, threads=1,
        groups={"value_embedding": {"lr": 0.1, "beta2": 0.99}, "again": {"beta1": 0.5}}, recompute="full",
    )  # fmt: skip
    found = []
    for name, stops in (("whole", [None]), ("stopped", [2, None])):
        for stop in stops:
            model = make_model(**shape)
            source = ExampleSource(make_examples(8), 32, params)
            try:
                fit(make_context(name, stop), model, CausalLM(), source, params)
            except TempFail:
                continue
        found.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*found)
    fresh = torch.cat([parameter.flatten() for parameter in make_model(**shape).parameters()])
    assert all((a != b).any() for a, b in zip(found, [fresh, fresh], strict=True))


@pytest.mark.parametrize(("changes", "told"), [({}, False), ({"decay_schedule": "cosine"}, True)])
def test_a_longer_run_is_told_that_decay_has_been_that_of_a_shorter_one(
    make_context, make_model, make_examples, changes: dict, told: bool
) -> None:
    for steps in (4, 6):
        values = {"max_steps": steps, "batch_size": 2, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1}
        params = TrainParams(**values, **changes, threads=1)
        context = make_context()
        fit(context, make_model(), CausalLM(), ExampleSource(make_examples(8), 32, params), params)
    warned = [str(fields) for kind, fields in context.events if "planned for 4 steps" in str(fields)]
    assert bool(warned) == told
