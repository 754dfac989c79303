"""RMSNorm, the rotary turn and cross-entropy with gradients written by hand, for training in float32 on CPU.

Composed of single operations, a norm over 2048 x 128 and its gradient take 1.8 ms on one core, of which most is memory
read and written anew; by hand .7 ms. What `fits` leaves out (autocast, compiled, exported or sharded models) computes
the same formulas through torch's own operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fits(x: Tensor) -> bool:
    """Whether a gradient by hand pays for `x`: a plain tensor on CPU that some gradient will flow through."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch
    )


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) times the gain, if there is one, over the last axis (1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, dim)` to the same shape."""
        gain: Tensor | None = self.weight
        plain = gain is None or (type(gain) is nn.Parameter and gain.dtype == x.dtype)
        if plain and self.eps is not None and fits(x):
            gain = x.new_ones(x.shape[-1]) if gain is None else gain
            return _RMSNorm.apply(x, gain, self.eps)  # type: ignore[no-any-return, no-untyped-call]  # torch
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """dx = r (g w - y mean(g w y)) with r = 1 / rms(x), y = r x; dw = sum(g y)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is going to be taken of what is returned
            wanted = (x, weight) if ctx.needs_input_grad[1] else (x,)
            found = torch.autograd.grad(F.rms_norm(x, weight.shape, weight, ctx.eps), wanted, grad, create_graph=True)
            return found[0], found[1] if len(found) > 1 else None, None
        y = x * inverse
        product = grad * y
        along = (product @ weight).div_(x.shape[-1]).unsqueeze_(-1)
        dx = (grad * weight).addcmul_(y, along, value=-1).mul_(inverse)
        return dx, product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`llmctl.nn.positions.rotate` of all channels of `x`, for which `fits` holds; the angles get no gradient."""
    return _Turn.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]  # torch


class _Turn(torch.autograd.Function):
    """The gradient of a turn is the turn back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = cos.shape[-1]
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        # Not addcmul, which rounds once less: the forward pass is to the bit that of `rotate` in evaluation.
        return swapped.mul_(torch.cat((-sin, sin), dim=-1)).add_(x * torch.cat((cos, cos), dim=-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] over `logits (N, V)` and `targets (N,)`, in nats; no target is left out."""
    if fits(logits):
        return _CrossEntropy.apply(logits, targets)  # type: ignore[no-any-return, no-untyped-call]  # torch
    return F.cross_entropy(logits, targets, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    """softmax - one-hot, without the N x V gradient of the log-probabilities, which is zero but for the targets."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        chosen = targets.unsqueeze(1)
        logs = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(logs, chosen)
        return -logs.gather(1, chosen).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logs, chosen = ctx.saved_tensors
        found = logs.exp()
        found.scatter_add_(1, chosen, found.new_full(chosen.shape, -1.0))
        return found.mul_(grad), None
