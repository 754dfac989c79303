"""Optimizer state kept in the host's memory and brought to the device for the step alone, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BUCKET = 64 << 20
"""Bytes of parameters whose state is on the device at a time."""


class Offload:
    """Steps optimizers whose state lives in pinned host memory between the steps.

    Copies in both directions are queued behind the computation, and cost the time that the bus takes. The numbers are
    those of a step with everything on the device. Tensors of one element stay.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], bucket: int = BUCKET) -> None:
        self.optimizers, self.bucket = optimizers, bucket

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of `optimizer`, bucket by bucket: only parameters with a gradient are moved."""
        steps = getattr(optimizer, "steps", None)
        grads = {p: p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for parameter in grads:
            parameter.grad = None
        for bucket in self.buckets(list(grads)):
            if steps is not None:
                optimizer.steps = steps  # type: ignore[attr-defined]  # of a Descent: every bucket takes the same step
            for parameter in bucket:
                parameter.grad = grads[parameter]
                self._bring(optimizer, parameter)
            optimizer.step()
            for parameter in bucket:
                parameter.grad = None
                self._put_away(optimizer, parameter)

    def buckets(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters in turn, those of one shape together, about `bucket` bytes at a time."""
        found: list[Tensor] = []
        for parameter in sorted(parameters, key=lambda p: tuple(p.shape)):
            if found and sum(p.nbytes for p in found) + parameter.nbytes > self.bucket:
                yield found
                found = []
            found.append(parameter)
        if found:
            yield found

    def put_away(self) -> None:
        """Move all state to the host."""
        for optimizer in self.optimizers:
            for parameter in optimizer.state:
                self._put_away(optimizer, parameter)

    def settle(self) -> None:
        """Wait until what is in the host's memory may be read."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _bring(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        state = optimizer.state[parameter]
        for key, value in state.items():
            state[key] = value.to(parameter.device, non_blocking=True)

    def _put_away(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        state = optimizer.state[parameter]
        for key, value in state.items():
            if value.numel() > 1 and value.device.type == "cuda":
                host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                state[key] = host.copy_(value, non_blocking=True)
