"""Cross-entropy whose logits are never all there at once: V numbers per target, the largest tensor of small models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmctl.nn.kernels import summed_cross_entropy
from llmctl.nn.transformer import Transformer


def summed_loss(
    model: Transformer, states: Tensor, targets: Tensor, accuracy: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of -log p of `targets (N,)` given `states (N, D)`, in nats; with `accuracy`, how many are the likeliest too.

    The logits of `model.loss_chunk` targets are held at a time (0: of all), and their gradients are taken right away:
    the loss and its gradients are those of all at once, only added up in another order, and nothing is computed twice.
    `torch.nn.functional.linear_cross_entropy` knows no soft cap and no layers between states and logits.
    """
    chunk = model.loss_chunk
    if not chunk or len(targets) <= chunk:
        loss, found = _of(model, states, targets, accuracy)
    elif torch.is_grad_enabled():
        weights = [p for p in model.head_parameters() if p.requires_grad]
        loss, found = _Chunked.apply(model, accuracy, targets, states, *weights)  # type: ignore[no-untyped-call]  # torch
    else:
        parts = [_of(model, *part, accuracy) for part in _chunks(states, targets, chunk)]
        loss, found = (torch.stack(numbers).sum() for numbers in zip(*parts, strict=True))
    return loss, {"accuracy": found} if accuracy else {}


def token_losses(model: Transformer, states: Tensor, targets: Tensor) -> Tensor:
    """-log p of each of `targets (N,)`, `(N,)` float32; in chunks, logits are computed again for the gradient."""

    def losses(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(wide(model.head(states)), targets, reduction="none")

    chunk = model.loss_chunk
    if not chunk or len(targets) <= chunk:
        return losses(states, targets)
    parts = _chunks(states, targets, chunk)
    if not torch.is_grad_enabled():
        return torch.cat([losses(*part) for part in parts])
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


def head_loss(model: Transformer, states: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p of `targets (N,)` given `states (N, D)`, all logits at once."""
    return summed_cross_entropy(wide(model.head(states)), targets)


def _of(model: Transformer, states: Tensor, targets: Tensor, accuracy: bool) -> tuple[Tensor, Tensor]:
    if not accuracy:
        # A head that is spread over ranks is left to torch's own operations.
        compiled = model.loss if model.loss and type(model.head_weight) in (Tensor, nn.Parameter) else None
        loss = compiled(states, targets) if compiled else head_loss(model, states, targets)
        return loss, torch.zeros_like(loss)
    logits = wide(model.head(states))
    return summed_cross_entropy(logits, targets), hits(logits, targets)


def wide(logits: Tensor) -> Tensor:
    """At least float32: half precision is too coarse for a softmax."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many of `targets (N,)` are the likeliest of `logits (N, C)`."""
    return (logits.detach().argmax(-1) == targets).sum().float()


def _chunks(states: Tensor, targets: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(states, chunk), torch.split(targets, chunk), strict=True)


class _Chunked(torch.autograd.Function):
    """The loss is a sum, so its gradients are known up to one factor before the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, model: Transformer, accuracy: bool, targets: Tensor, states: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        for_states = torch.empty_like(states)
        for_weights = [torch.zeros_like(weight) for weight in weights]
        losses, found, chunk = [], [], model.loss_chunk
        for place, (part, wanted) in enumerate(_chunks(states, targets, chunk)):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss, right = _of(model, leaf, wanted, accuracy)
            first, *rest = torch.autograd.grad(loss, (leaf, *weights))
            for_states[place * chunk : place * chunk + len(part)] = first
            for sum_, grad in zip(for_weights, rest, strict=True):
                sum_.add_(grad)
            losses.append(loss.detach())
            found.append(right)
        ctx.save_for_backward(for_states, *for_weights)
        total = torch.stack(found).sum()
        ctx.mark_non_differentiable(total)
        return torch.stack(losses).sum(), total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for_states, *for_weights = ctx.saved_tensors
        return None, None, None, for_states * grads[0], *(weight * grads[0] for weight in for_weights)
