"""Linear layers by oneDNN against torch's own of the same numbers, and against float64."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmctl.nn import products
from llmctl.nn.products import Linear, linear
from llmctl.train.recompute import wrapper

SIZES = [(256, 64, 96), (64, 256, 128), (33, 200, 177)]


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is taken whatever the processor, and for small products, too; the shapes it got."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    shapes: list[tuple[int, ...]] = []
    onednn = products._onednn

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append((*x.shape[:-1], x.shape[-1], weight.shape[0]))
        return onednn(x, weight, bias)

    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(products, "SMALLEST", 1 << 10)
    monkeypatch.setattr(products, "_onednn", seen)
    return shapes


def normal(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def parts(rows: int, inner: int, outer: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(rows, inner), normal(outer, inner, seed=1), normal(outer, seed=2)


def errors(found: Any, exact: Any) -> list[float]:
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("biased", [True, False])
def test_the_product_and_its_gradients_are_as_near_to_float64_as_torchs(
    used: list[tuple[int, ...]], sizes: tuple[int, int, int], biased: bool
) -> None:
    leaves = parts(*sizes)[: 3 if biased else 2]
    grad = normal(sizes[0], sizes[2], seed=3, grad=False)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        out = function(*own)
        return [out.detach(), *torch.autograd.grad(out, own, grad.to(dtype))]

    exact = run(F.linear, torch.float64)
    ours, theirs = errors(run(linear, torch.float32), exact), errors(run(F.linear, torch.float32), exact)
    rows, inner, outer = sizes
    assert used == [(rows, inner, outer), (rows, outer, inner), (outer, rows, inner)]
    # Sums of n products in another order: a few epsilons, whatever the library.
    assert max(ours) < 2 * max(theirs) < 4e-6


def test_second_derivatives_are_torchs() -> None:
    x, weight, bias = parts(64, 48, 32)

    def curvature(function: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(x, weight, bias).square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight, bias))  # type: ignore[arg-type]

    torch.testing.assert_close(curvature(linear), curvature(F.linear), rtol=1e-4, atol=1e-1)


def test_what_is_frozen_gets_no_gradient_and_costs_no_product(used: list[tuple[int, ...]]) -> None:
    x, weight, bias = parts(64, 48, 32)
    for leaf in (x, weight):
        used.clear()
        leaf.requires_grad_(False)
        linear(x, weight, bias).sum().backward()
        assert len(used) == 2
        assert leaf.grad is None
        assert bias.grad is not None
        leaf.requires_grad_(True)
        x.grad = weight.grad = bias.grad = None


@pytest.mark.parametrize("bias", [normal(96, 3)[:, 0], normal(1).expand(96), normal(1)])
def test_a_bias_that_is_no_plain_vector_is_torchs(used: list[tuple[int, ...]], bias: Tensor) -> None:
    x, weight, _ = parts(256, 64, 96)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=0)
    assert used == []


class Computed(TorchDispatchMode):
    """Counts the products that are computed, not those that are taken from what was kept."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in products.OPERATORS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "expected"), [("none", 6), ("selective", 6), ("full", 8)])
def test_selective_recomputation_keeps_products(mode: str, expected: int) -> None:
    layers, x = [Linear(64, 64), Linear(64, 64)], normal(256, 64)

    def block(x: Tensor) -> Tensor:
        return layers[1](torch.tanh(layers[0](x)))  # type: ignore[no-any-return]

    wrap = wrapper(mode, 0.0)
    with Computed() as computed:
        (block(x) if wrap is None else wrap(block, x)).sum().backward()
    assert computed.products == expected


def test_training_and_evaluation_give_the_same_bits() -> None:
    layer, x = Linear(64, 96), normal(4, 32, 64)
    trained = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), trained)


def test_what_oneDNN_is_not_taken_for(used: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: N802
    x, weight, bias = parts(256, 64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert torch.equal(linear(x[:3], weight, bias), F.linear(x[:3], weight, bias))
    assert torch.equal(linear(x[:8, :4], weight[:8, :4]), F.linear(x[:8, :4], weight[:8, :4]))
    linear(x.double(), weight.double())
    linear(x.to("meta"), weight.to("meta"))
    assert used == []
    linear(x, weight, bias)
    assert used != []
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", False)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(used) == 1


def test_an_exported_layer_is_torchs_own_operator() -> None:
    layer, x = Linear(64, 96), normal(256, 64, grad=False)
    for strict in (True, False):
        program = torch.export.export(layer, (x,), strict=strict)
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert names == {"aten.linear.default"}
    torch.export.save(program, io.BytesIO())


@pytest.mark.slow
def test_a_compiled_layer_multiplies_the_same_way(used: list[tuple[int, ...]]) -> None:
    layer, x = Linear(64, 96), normal(256, 64)
    plain = layer(x)
    expected = torch.autograd.grad(plain.square().sum(), (x, layer.weight, layer.bias))
    used.clear()
    compiled = torch.compile(layer, fullgraph=True)(x)
    found = torch.autograd.grad(compiled.square().sum(), (x, layer.weight, layer.bias))
    assert len(used) >= 3
    torch.testing.assert_close((compiled, *found), (plain, *expected), rtol=1e-5, atol=1e-4)
