"""AdamW with its moments in 8 bits: 2 bytes and a little of state per parameter instead of 8 (2110.02861)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llmctl.train.descent import Descent, Groups, State, adam_direction, decay_

BLOCK = 256
"""Values that share one scale: an outlier coarsens its own block alone."""
SMALLEST = 4096
"""Smaller tensors keep float32 moments: they cost nothing, and norms are sensitive."""


class AdamW8bit(Descent):
    """AdamW whose two moments are codes of the dynamic map, `BLOCK` values to a scale, between the steps.

    Groups with `bits: 32` (embeddings: the paper's section 2.3) and tensors under `SMALLEST` keep them in float32.
    """

    def __init__(
        self,
        params: Groups,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        cautious: bool = False,
        bits: int = 8,
    ) -> None:
        values = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "cautious": cautious, "bits": bits}
        super().__init__(params, lr=lr, **values)

    def update(self, p: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """See the class."""
        small = group["bits"] == 32 or p.numel() < SMALLEST
        if small:
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            mean, square = state["exp_avg"], state["exp_avg_sq"]
        else:
            mean = _read(state, "exp_avg", p, signed=True)
            square = _read(state, "exp_avg_sq", p, signed=False)
        direction = adam_direction(mean, square, grad, self.steps, group)
        if not small:
            state["exp_avg"], state["exp_avg_scale"] = quantise(mean, signed=True)
            state["exp_avg_sq"], state["exp_avg_sq_scale"] = quantise(square, signed=False)
        decay_(p, direction, group["lr"] * group["weight_decay"], group["cautious"])
        p.add_(direction, alpha=-group["lr"])


def _read(state: State, name: str, p: Tensor, signed: bool) -> Tensor:
    if name not in state:
        return torch.zeros_like(p)
    return dequantise(state[name], state[f"{name}_scale"], signed, p.shape, p.dtype)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes of `x` in each block, `(blocks, BLOCK)` uint8, and the blocks' scales `(blocks,)`."""
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(dim=1)
    values = dynamic_map(signed).to(x.device, x.dtype)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(flat / scale.clamp(min=torch.finfo(x.dtype).tiny)[:, None], middles)
    return codes.to(torch.uint8), scale


def dequantise(codes: Tensor, scale: Tensor, signed: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What `quantise` gave, as a tensor of `shape`."""
    values = dynamic_map(signed).to(codes.device, dtype)
    return (values[codes.int()] * scale[:, None]).flatten()[: shape.numel()].view(shape)


@lru_cache(maxsize=2)
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the dynamic data type, rising from -1 or 0 to 1 (1511.04561): float64 on the CPU.

    A code has a sign (if `signed`), a run of zeros that counts powers of ten down, and the rest divides that decade
    evenly; so small values keep their relative precision over seven decades. 0 and 1 are values of their own.
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        # The bits that the sign and the run leave; without a sign each decade has one more.
        parts = 2 ** (6 - zeros) if signed else 2 ** (7 - zeros)
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float64)
        decade = ((edges[:-1] + edges[1:]) / 2 * 10.0**-zeros).tolist()
        values += [*decade, *(-value for value in decade)] if signed else decade
    return torch.tensor(sorted(values), dtype=torch.float64)
