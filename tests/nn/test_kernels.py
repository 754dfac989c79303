"""Gradients by hand against torch's own of the same formulas, to the first and the second derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.nn.kernels import RMSNorm, fits, summed_cross_entropy, turn
from llmctl.nn.positions import rotate


def normal(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_(grad)


def norm(dim: int) -> RMSNorm:
    made = RMSNorm(dim, eps=1e-5).double()
    made.weight.data = normal(dim, seed=1, grad=False)
    return made


def test_the_norm_equals_torchs_and_its_gradients_hold_numerically() -> None:
    x, made = normal(3, 5, 8), norm(8)
    assert torch.equal(made(x), F.rms_norm(x, (8,), made.weight, 1e-5))
    assert torch.autograd.gradcheck(made, (x,))
    assert torch.autograd.gradgradcheck(made, (x,))
    ours = torch.autograd.grad(made(x).square().sum(), (x, made.weight))
    theirs = torch.autograd.grad(F.rms_norm(x, (8,), made.weight, 1e-5).square().sum(), (x, made.weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_norm_without_a_gain_equals_torchs() -> None:
    x, made = normal(3, 5, 8), RMSNorm(8, eps=1e-5, elementwise_affine=False)
    assert torch.equal(made(x), F.rms_norm(x, (8,), None, 1e-5))
    assert "_RMSNorm" in type(made(x).grad_fn).__name__
    assert torch.autograd.gradcheck(made, (x,))
    assert torch.autograd.gradgradcheck(made, (x,))


def test_the_turns_gradients_hold_numerically() -> None:
    angles = normal(1, 5, 1, 3, seed=2, grad=False)
    x, cos, sin = normal(2, 5, 4, 6), angles.cos(), angles.sin()
    with torch.no_grad():
        plain = rotate(x, cos, sin)  # composed of single operations
    assert torch.equal(turn(x, cos, sin), plain)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, cos, sin), (x,))
    assert not torch.allclose(turn(x, cos, -sin), plain)


def test_cross_entropy_equals_torchs_also_far_from_the_target() -> None:
    logits, targets = (normal(4, 7) * 300).detach().requires_grad_(), torch.tensor([0, 6, 3, 3])
    ours, theirs = summed_cross_entropy(logits, targets), F.cross_entropy(logits, targets, reduction="sum")
    assert ours > 100
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, targets), (normal(4, 7),))
    grads = [torch.autograd.grad(loss / 3, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-15)
    (first,) = torch.autograd.grad(summed_cross_entropy(logits, targets), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        first.sum().backward()  # a second derivative is an error, not a wrong number


def test_a_frozen_gain_gets_no_gradient() -> None:
    x, made = normal(3, 8), norm(8).requires_grad_(False)
    made(x).sum().backward()
    assert x.grad is not None
    assert made.weight.grad is None


@pytest.mark.parametrize("kind", ["no gradient wanted", "no_grad", "bfloat16", "autocast"])
def test_what_does_not_fit_goes_through_torch(kind: str) -> None:
    x = torch.zeros(2, 8, requires_grad=kind != "no gradient wanted")
    assert fits(torch.zeros(2, 8, requires_grad=True))
    made = RMSNorm(8, eps=1e-5)
    if kind == "bfloat16":
        x, made = x.bfloat16(), made.bfloat16()
    with torch.set_grad_enabled(kind != "no_grad"), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert not fits(x)
        assert made(x).abs().max() == 0
