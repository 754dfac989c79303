"""Each optimizer against its formula, over 20 steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmctl.train import eight_bit, muon, optimizers
from llmctl.train.descent import Adafactor
from llmctl.train.eight_bit import dequantise, dynamic_map, quantise
from llmctl.train.optimizers import Optimizers, Rates, kind_of
from llmctl.train.params import TrainParams

LR, DECAY = 0.01, 0.1
Formula = Callable[[Tensor, list[Tensor]], Tensor]


def gradients(shape: tuple[int, ...], steps: int = 20) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator), [torch.randn(shape, generator=generator) for _ in range(steps)]


class Net(nn.Module):
    """One hidden matrix, one embedding, one vector."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*weight.T.shape, bias=False)
        self.embedding = nn.Embedding(*weight.shape)
        self.gain = nn.Parameter(torch.ones(len(weight)))
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            self.embedding.weight.copy_(weight)

    def take(self, run: Optimizers, grads: list[Tensor], factor: float = 1.0) -> None:
        for grad in grads:
            self.layer.weight.grad, self.embedding.weight.grad = grad.clone(), grad.clone()
            self.gain.grad = grad[:, 0].clone()
            run.step(factor)


def decayed(w: Tensor, update: Tensor, cautious: bool) -> Tensor:
    return w * (1 - LR * DECAY * ((w * update > 0).to(w.dtype) if cautious else 1.0))


def sgd(w: Tensor, grads: list[Tensor], nesterov: bool = True, cautious: bool = False) -> Tensor:
    v = torch.zeros_like(w)
    for grad in grads:
        v = 0.95 * v + grad
        update = grad + 0.95 * v if nesterov else v
        w = decayed(w, update, cautious) - LR * update
    return w


def lion(w: Tensor, grads: list[Tensor], cautious: bool = False) -> Tensor:
    m = torch.zeros_like(w)
    for grad in grads:
        update = torch.sign(0.9 * m + 0.1 * grad)
        w = decayed(w, update, cautious) - LR * update
        m = 0.95 * m + 0.05 * grad
    return w


def adamw(w: Tensor, grads: list[Tensor], cautious: bool = False, store: Any = lambda x, signed: x) -> Tensor:
    m = v = torch.zeros_like(w)
    for t, grad in enumerate(grads, start=1):
        m, v = 0.9 * store(m, True) + 0.1 * grad, 0.95 * store(v, False) + 0.05 * grad**2
        update = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        w = decayed(w, update, cautious) - LR * update
    return w


def adafactor(w: Tensor, grads: list[Tensor]) -> Tensor:
    rows, columns = torch.zeros(len(w), 1).to(w), torch.zeros(1, w.shape[1]).to(w)
    for t, grad in enumerate(grads, start=1):
        rate = min(LR, t**-0.5) * max(1e-3, float(w.square().mean().sqrt()))
        rows = (1 - t**-0.8) * rows + t**-0.8 * (grad**2).mean(1, keepdim=True)
        columns = (1 - t**-0.8) * columns + t**-0.8 * (grad**2).mean(0, keepdim=True)
        update = grad / (rows @ columns / rows.mean()).sqrt()
        w = w * (1 - LR * DECAY) - rate * update / max(1.0, float(update.square().mean().sqrt()))
    return w


def schedule_free(w: Tensor, grads: list[Tensor]) -> Tensor:
    z, x, v, total = w, w, torch.zeros_like(w), 0.0
    for t, grad in enumerate(grads, start=1):
        y = 0.1 * z + 0.9 * x
        v = 0.95 * v + 0.05 * grad**2
        total += LR**2
        z = z - LR * (grad / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + DECAY * y)
        x = (1 - LR**2 / total) * x + LR**2 / total * z
    return x


CASES: dict[str, tuple[dict[str, Any], Formula]] = {
    "sgd": ({"optimizer": "sgd"}, sgd),
    "sgd plain momentum": ({"optimizer": "sgd", "nesterov": False}, lambda w, g: sgd(w, g, nesterov=False)),
    "sgd cautious": ({"optimizer": "sgd", "cautious_decay": True}, lambda w, g: sgd(w, g, cautious=True)),
    "lion": ({"optimizer": "lion"}, lion),
    "lion cautious": ({"optimizer": "lion", "cautious_decay": True}, lambda w, g: lion(w, g, cautious=True)),
    "adamw": ({"optimizer": "adamw"}, adamw),
    "adamw cautious": ({"optimizer": "adamw", "cautious_decay": True}, lambda w, g: adamw(w, g, cautious=True)),
    "adafactor": ({"optimizer": "adafactor"}, adafactor),
    "schedule-free": ({"optimizer": "schedule-free", "schedule": "constant"}, schedule_free),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_optimizer_equals_its_formula_over_20_steps(case: str, dtype: torch.dtype) -> None:
    start, grads = gradients((16, 24))
    changes, formula = CASES[case]
    net = Net(start).to(dtype)
    run = Optimizers(net, TrainParams(lr=LR, weight_decay=DECAY, **changes))
    net.take(run, [grad.to(dtype) for grad in grads])
    found = run.average().get(net.layer.weight, net.layer.weight)
    expected = formula(start.double(), [grad.double() for grad in grads])
    assert (found - expected).abs().max() <= (1e-9 if dtype is torch.float64 else 2e-6)
    assert (expected - start).abs().max() > 0.01


def test_adafactor_equals_torch_where_its_bound_does_not_bind() -> None:
    for shape in ((16, 24), (24,)):
        start, grads = gradients(shape)
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        pair = Adafactor([ours], LR, DECAY), torch.optim.Adafactor([theirs], LR, weight_decay=DECAY)
        for grad in grads:
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            for optimizer in pair:
                optimizer.step()
        assert (ours - theirs).abs().max() <= 2e-6


def nearest(x: Tensor, signed: bool) -> Tensor:
    """The definition: of all 256 values times the block's largest, the nearest."""
    values = dynamic_map(signed).numpy()
    blocks = np.pad(x.flatten().numpy(), (0, -x.numel() % 256)).reshape(-1, 256)
    scale = np.abs(blocks).max(1, keepdims=True)
    codes = np.abs((blocks / np.maximum(scale, 1e-300))[..., None] - values).argmin(-1)
    return torch.from_numpy((values[codes] * scale).reshape(-1)[: x.numel()].reshape(x.shape))


@pytest.mark.parametrize("cautious", [False, True])
def test_8_bit_adamw_equals_its_formula_over_20_steps(cautious: bool) -> None:
    start, grads = gradients((48, 90))  # 4320 values: above the bound, and no multiple of a block
    net = Net(start).double()
    run = Optimizers(net, TrainParams(optimizer="adamw8bit", lr=LR, weight_decay=DECAY, cautious_decay=cautious))
    net.take(run, [grad.double() for grad in grads])
    expected = adamw(start.double(), [grad.double() for grad in grads], cautious, nearest)
    assert (net.layer.weight - expected).abs().max() <= 2e-6
    exact = adamw(start.double(), [grad.double() for grad in grads], cautious)
    assert (net.layer.weight - exact).abs().max() > 1e-4  # the control: it did round
    # Embeddings keep 32 bits (and do not decay here).
    no_decay = Net(start).double()
    plain = Optimizers(no_decay, TrainParams(optimizer="adamw", lr=LR))
    no_decay.take(plain, [grad.double() for grad in grads])
    assert (net.embedding.weight - no_decay.embedding.weight).abs().max() <= 1e-9


def test_bytes_of_state_are_read_from_the_tensors() -> None:
    start, grads = gradients((64, 128), steps=1)
    found = {}
    for name in ("adamw", "adamw8bit", "adafactor", "lion", "sgd", "schedule-free", "muon"):
        net = Net(start)
        schedule = "constant" if name == "schedule-free" else "cosine"
        run = Optimizers(net, TrainParams(optimizer=name, schedule=schedule))
        net.take(run, grads)
        state = {full: tensor for full, tensor in run.state().items() if full.startswith("layer.weight/")}
        found[name] = sum(tensor.nbytes for tensor in state.values() if tensor.numel() > 1) / net.layer.weight.numel()
    assert found["adamw"] == found["schedule-free"] == 8 and found["lion"] == found["sgd"] == found["muon"] == 4
    assert found["adamw8bit"] == 2 + 2 * 4 / 256 and found["adafactor"] == 4 * (64 + 128) / (64 * 128)


def test_the_dynamic_map_and_its_error() -> None:
    for signed in (True, False):
        values = dynamic_map(signed)
        assert len(values) == 256 and values[-1] == 1 and 0 in values and (values.diff() > 0).all()
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(x, signed=True)
    assert codes.dtype == torch.uint8 and codes.shape == (4, 256) and scale.shape == (4,)
    back = dequantise(codes, scale, True, x.shape, x.dtype)
    assert (back - x).abs().max() / scale.max() < 0.01
    # Small values keep their relative precision; evenly spaced codes would lose them.
    small = torch.tensor([1.0, 1e-3, 2e-5])
    back = dequantise(*quantise(small, True), True, small.shape, small.dtype)
    assert ((back - small) / small).abs().max() < 0.12
    assert torch.equal(dequantise(*quantise(torch.zeros(3), True), True, small.shape, small.dtype), torch.zeros(3))


def test_8_bit_ends_within_two_percent_of_full_state() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(256, 128), torch.randn(256, 64)
    found = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64))
        run = Optimizers(net, TrainParams(optimizer=name, lr=3e-3))
        for _ in range(80):
            loss = (net(x) - y).square().mean()
            loss.backward()
            run.step(1.0)
        found[name] = float(loss.detach())
    assert found["adamw8bit"] == pytest.approx(found["adamw"], rel=0.02) and found["adamw"] < 0.5


def test_half_precision_weights_stall_where_float32_masters_move() -> None:
    """The reason why `fit` trains float32 weights whatever the precision of the products."""
    ends = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight = nn.Parameter(torch.ones(8, 8, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
        for _ in range(1000):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends[dtype] = float(weight.detach().mean())
    assert ends[torch.bfloat16] == 1.0 and ends[torch.float32] == pytest.approx(0.0, abs=1e-3)


def muon_formula(w: Tensor, grads: list[Tensor], values: dict[str, Any]) -> Tensor:
    m, mean = torch.zeros_like(w), 0.0
    tall = w.shape[0] > w.shape[1]
    for grad in grads:
        m = 0.95 * m + 0.05 * grad
        x = 0.05 * grad + 0.95 * m if values.get("nesterov", True) else m
        x = x.T if tall else x
        kind = values.get("muon_iteration", "newton-schulz")
        x = x / x.norm() / (1.02 if kind == "polar-express" else 1.0)
        for a, b, c in muon.ITERATIONS[kind]:
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        x = x.T if tall else x
        if values.get("muon_variance"):
            axis = 1 if w.shape[0] >= w.shape[1] else 0
            mean = 0.95 * mean + 0.05 * x.square().mean(axis, keepdim=True)
            level = x / mean.sqrt()
            x = level * x.norm() / level.norm()
        w = decayed(w, x, values.get("cautious_decay", False)) - LR * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x
    return w


@pytest.mark.parametrize("shape", [(16, 24), (32, 8)])
@pytest.mark.parametrize(
    "values",
    [
        {"muon_iteration": "polar-express"},
        {"muon_variance": True},
        {"cautious_decay": True},
        {"nesterov": False},
        {"muon_iteration": "polar-express", "muon_variance": True, "cautious_decay": True},
    ],
    ids=lambda values: "+".join(values),
)
def test_muons_options_equal_their_formulas(shape: tuple[int, int], values: dict[str, Any]) -> None:
    start, grads = gradients(shape)
    net = Net(start).double()
    run = Optimizers(net, TrainParams(lr=LR, weight_decay=DECAY, **values))
    net.take(run, [grad.double() for grad in grads])
    expected = muon_formula(start.double(), [grad.double() for grad in grads], values)
    assert (net.layer.weight - expected).abs().max() <= 1e-9
    without = muon_formula(start.double(), [grad.double() for grad in grads], {})
    assert (without - expected).abs().max() > 1e-4  # each option does something


def test_polar_express_comes_closer_to_one() -> None:
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(matrix[None], "polar-express")[0])
    assert values.min() > 0.85 and values.max() < 1.15
    assert torch.linalg.svdvals(muon.orthogonalise(matrix[None])[0]).min() < 0.72


def test_levelled_rows_are_equal_where_orthogonal_ones_are_not() -> None:
    start, grads = gradients((32, 8), steps=1)
    spread = {}
    for variance in (False, True):
        net = Net(torch.zeros_like(start))
        net.take(Optimizers(net, TrainParams(lr=1.0, muon_variance=variance)), grads)
        rows = net.layer.weight.detach().norm(dim=1)
        spread[variance] = float(rows.max() / rows.min())
    assert spread[True] == pytest.approx(1.0, rel=1e-4) and spread[False] > 1.3


def test_muon_without_orthogonalisation_misses_the_bar(monkeypatch) -> None:
    """Ill-conditioned regression: what makes Muon Muon is the iteration, not the momentum."""

    def loss_after(steps: int = 60) -> float:
        torch.manual_seed(0)
        x = torch.randn(128, 32) * torch.logspace(0, -2, 32)
        y = x @ torch.randn(32, 32) * 0.2
        layer = nn.Linear(32, 32, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = muon.Muon([layer.weight], lr=0.1)
        for step in range(steps):
            loss = (layer(x) - y).square().mean()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    bar = 0.003
    assert loss_after() < bar
    monkeypatch.setitem(muon.ITERATIONS, "newton-schulz", ())
    assert loss_after() > 4 * bar


def test_groups_have_their_own_rates_and_decay(make_model) -> None:
    model = make_model(arch="gpt2", tie_embeddings=False, kv_heads=4)
    values = {"lr": 0.02, "embedding_lr": 0.3, "head_lr": 0.008, "vector_lr": 0.5, "weight_decay": 0.1}
    for decay in (False, True):
        run = Optimizers(model, TrainParams(optimizer="adamw", decay_embeddings=decay, **values))
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = {
            names[p]: (group["lr"], group["weight_decay"]) for group in run.all[0].param_groups for p in group["params"]
        }
        outer = 0.1 if decay else 0.0
        assert found["embedding.weight"] == found["positions.weight"] == (0.3, outer)
        assert found["unembedding.weight"] == (0.008, outer)
        assert found["blocks.0.attention.q.weight"] == (0.02, 0.1)
        assert found["blocks.0.attention.q.bias"] == found["norm.weight"] == (0.5, 0.0)
        assert set(found) == set(names.values())
    # Unset, they follow embedding_lr, and that lr.
    rates = Rates.plan(TrainParams(optimizer="muon", lr=0.02), 32).of
    assert rates == {"matrix": 0.02, "embedding": 0.03, "head": 0.03, "vector": 0.03}
    assert {kind_of(name, parameter) for name, parameter in model.named_parameters()} == set(optimizers.KINDS)


def test_scaling_rules_equal_their_formulas_and_explain_themselves() -> None:
    plain = {"lr": 0.1, "embedding_lr": 0.2, "optimizer": "adamw", "batch_size": 64}

    def rates(**changes: Any) -> Rates:
        return Rates.plan(TrainParams(**{**plain, **changes}), 3072)

    assert rates().of == {"matrix": 0.1, "embedding": 0.2, "head": 0.2, "vector": 0.2} and rates().notes == ()
    assert rates(scale_lr_with_batch="sqrt").of["matrix"] == pytest.approx(0.1 * 2)
    assert rates(scale_lr_with_batch="linear").of["embedding"] == pytest.approx(0.2 * 4)
    assert rates(scale_lr_with_batch="linear", reference_batch=256).of["vector"] == pytest.approx(0.2 / 4)
    wide = rates(scale_lr_with_width="sqrt")
    assert wide.of == pytest.approx({"matrix": 0.05, "embedding": 0.1, "head": 0.1, "vector": 0.1})
    muon_rates = rates(scale_lr_with_width="sqrt", optimizer="muon")
    assert muon_rates.of == pytest.approx({"matrix": 0.1, "embedding": 0.1, "head": 0.1, "vector": 0.1})
    inverse = rates(scale_lr_with_width="inverse", reference_width=1536)
    assert inverse.of == pytest.approx({"matrix": 0.05, "embedding": 0.2, "head": 0.2, "vector": 0.2})
    both = rates(scale_lr_with_width="sqrt", scale_lr_with_batch="sqrt")
    assert both.notes == (
        "batch 64 for 16 (sqrt): all rates x 2",
        "width 3072 for 768 (sqrt): rates of matrix, embedding, head, vector x 0.5",
        "peak rates matrix 0.1, embedding 0.2, head 0.2, vector 0.2",
    )


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="set schedule to constant"):
        TrainParams(optimizer="schedule-free")
    with pytest.raises(ValueError, match="set ema to 0"):
        TrainParams(optimizer="schedule-free", schedule="constant", ema=0.9)
    with pytest.raises(ValueError, match="cautious_decay works with"):
        TrainParams(optimizer="adafactor", cautious_decay=True)
    with pytest.raises(ValueError, match="0 or above 1"):
        TrainParams(spike_factor=0.9)
    for micro in (-1, 17):
        with pytest.raises(ValueError, match="not between 0 and batch_size 16"):
            TrainParams(micro_batch=micro)
    with pytest.raises(ValueError, match="needs beta1 above 0"):
        TrainParams(optimizer="schedule-free", schedule="constant", beta1=0.0)


def test_small_tensors_keep_32_bits(monkeypatch) -> None:
    start, grads = gradients((16, 24), steps=1)
    kinds = {}
    for least in (16 * 24 + 1, 16 * 24):
        monkeypatch.setattr(eight_bit, "SMALLEST", least)
        net = Net(start)
        run = Optimizers(net, TrainParams(optimizer="adamw8bit"))
        net.take(run, grads)
        kinds[least] = run.state()["layer.weight/exp_avg"].dtype
    assert list(kinds.values()) == [torch.float32, torch.uint8]


@pytest.mark.parametrize("name", ["muon", "adamw", "adamw8bit", "lion"])
def test_offloaded_state_gives_the_same_steps(name: str) -> None:
    start, grads = gradients((16, 24))
    found = []
    for offload in (False, True):
        net = Net(start)
        run = Optimizers(net, TrainParams(optimizer=name, offload_optimizer=offload))
        if run.offload is not None:
            run.offload.bucket = 1  # every parameter alone
            assert len(list(run.offload.buckets(list(net.parameters())))) == 3
        net.take(run, grads)
        found.append((net.layer.weight.detach(), run.state()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert set(found[0][1]) == set(found[1][1])
