"""Muon: momentum, orthogonalised by polynomials, for hidden matrices (Keller Jordan's blog; Moonlight 2502.16982).

The same update as `torch.optim.Muon`, which computes the iteration in bfloat16 everywhere: on CPUs without bfloat16
instructions that is 45 times slower than float32 (138 against 3 ms for 192 x 512 with AVX2). Here the iteration runs in
float32 on CPU and bfloat16 elsewhere, and matrices of one shape are iterated together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llmctl.train.descent import decay_
from llmctl.train.parts import gathered, placed

Polynomial = tuple[float, float, float]
"""a, b, c of a x + b x^3 + c x^5, applied to the singular values."""

ITERATIONS: dict[str, tuple[Polynomial, ...]] = {
    "newton-schulz": ((3.4445, -4.7750, 2.0315),) * 5,
    # Each polynomial is the best for the interval that the one before leaves (2505.16932, with a margin of 2 % against
    # rounding, as in modded-nanogpt).
    "polar-express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
MARGIN = {"newton-schulz": 1.0, "polar-express": 1.02}
"""By how much the norm is overstated before the first polynomial: Polar Express diverges above 1."""
AXES = {"none": (), "rows": (2,), "columns": (1,), "both": (2, 1)}
"""Along which axes the norms are taken that `equalise` makes alike."""


class Muon(torch.optim.Optimizer):
    """Only for 2-D hidden matrices; embeddings, heads and vectors belong to AdamW. Weight decay is decoupled.

    `variance` divides each row (of a wide matrix: each column) of the update by the root of its running mean square and
    gives the whole its norm back: the factored second moment of NorMuon (2510.05491), along the axis that
    orthogonalisation leaves uneven. `equalise` brings all rows, columns, or first one and then the other, to the same
    norm before the iteration, so that the singular values it begins with are closer (MuonEq, 2603.28254).
    `renormalise` gives the result the Frobenius norm of an exactly orthogonal matrix (Muon+, 2602.21545). `cautious`:
    see `decay_`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        iteration: str = "newton-schulz",
        scale: str = "original",
        variance: bool = False,
        equalise: str = "none",
        renormalise: bool = False,
        beta2: float = 0.95,
        cautious: bool = False,
    ) -> None:
        values = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "scale": scale}
        further = {"iteration": iteration, "equalise": equalise, "renormalise": renormalise}
        after = {"variance": variance, "beta2": beta2, "cautious": cautious}
        super().__init__(params, {**values, **further, **after})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices, got shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure here
        """One update from `.grad`; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = torch.stack([gathered(self._direction(p, group)) for p in parameters])
                for axis in AXES[group["equalise"]]:
                    directions = equalised(directions, axis)
                updates = orthogonalise(directions, group["iteration"])
                if group["renormalise"]:
                    updates = renormalised(updates)
                rate = group["lr"] * rate_factor(shape[0], shape[1], group["scale"])
                for parameter, update in zip(parameters, updates, strict=True):
                    update = update.to(parameter.dtype)
                    if group["variance"]:
                        update = self._levelled(parameter, update, group["beta2"])
                    update = placed(update, parameter)
                    decay_(parameter, update, group["lr"] * group["weight_decay"], group["cautious"])
                    parameter.add_(update, alpha=-rate)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The momentum; Nesterov: the gradient moved towards the running mean that already holds it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        return torch.lerp(parameter.grad, buffer, group["momentum"]) if group["nesterov"] else buffer

    def _levelled(self, parameter: Tensor, update: Tensor, beta2: float) -> Tensor:
        squares = update.square().mean(dim=1 if update.shape[0] >= update.shape[1] else 0, keepdim=True)
        state = self.state[parameter]
        if "variance" not in state:
            state["variance"] = torch.zeros_like(squares)
        mean: Tensor = state["variance"].lerp_(squares, 1 - beta2)
        level: Tensor = update * mean.clamp(min=1e-10).rsqrt()
        return level.mul_(update.norm() / level.norm().clamp(min=1e-10))


def orthogonalise(matrices: Tensor, iteration: str = "newton-schulz") -> Tensor:
    """Bring the singular values of `matrices (N, R, C)` near 1, keeping the singular vectors.

    To about .68 to 1.13 with `newton-schulz`, .86 to 1.14 with `polar-express`. Works on the shorter side, in the
    matrices' own dtype on CPU, in bfloat16 elsewhere.
    """
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.flatten(1).norm(dim=1) * MARGIN[iteration]).clamp(min=1e-7)[:, None, None]
    for a, b, c in ITERATIONS[iteration]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def equalised(matrices: Tensor, axis: int) -> Tensor:
    """`matrices (N, R, C)` with every row (`axis` 2: sums run along it) or column (1) of its matrix's mean norm."""
    norms = torch.linalg.vector_norm(matrices, dim=axis, keepdim=True)
    level = norms.square().mean(dim=3 - axis, keepdim=True).sqrt()
    found: Tensor = matrices * (level / norms.clamp(min=1e-7))
    return found


def renormalised(matrices: Tensor) -> Tensor:
    """`matrices (N, R, C)`, each with the Frobenius norm sqrt(min(R, C))."""
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    found: Tensor = matrices * (min(matrices.shape[1:]) ** 0.5 / norms.clamp(min=1e-7))
    return found


def rate_factor(rows: int, columns: int, scale: str) -> float:
    """What a matrix's rate is multiplied by: `original` sqrt(max(1, R / C)), `match_rms_adamw` .2 sqrt(max(R, C))."""
    if scale == "original":
        return float(max(1.0, rows / columns) ** 0.5)
    if scale == "match_rms_adamw":
        return float(0.2 * max(rows, columns) ** 0.5)
    raise ValueError(f"unknown scale {scale!r}")
