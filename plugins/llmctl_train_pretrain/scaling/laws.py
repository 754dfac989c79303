"""What a scaling law says: which size and how many tokens a budget is best spent on, and the loss that follows.

N parameters, D tokens, C operations; C = 6 N D throughout. Which parameters N counts is said by whoever fitted a law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

PF_DAY = 1e15 * 86_400
"""Operations in Kaplan's unit of compute."""
LARGEST = 700.0
"""Logarithms beyond this are cut off: laws of resamples that hardly tell a term apart reach numbers without meaning."""


def power(base: float, exponent: float) -> float:
    """base^exponent for base >= 0, without an overflow."""
    if base == 0 or math.isinf(base):
        return 0.0 if (base == 0) == (exponent > 0) else math.inf
    return math.exp(max(-LARGEST, min(LARGEST, exponent * math.log(base))))


@dataclass(frozen=True)
class Optimum:
    """The best split of `flops` = 6 N D; `loss` is None where the law predicts none."""

    parameters: float
    tokens: float
    loss: float | None

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6 * self.parameters * self.tokens


class Law(Protocol):
    """A frontier, N growing as C^a and D as C^(1 - a), perhaps with a loss for every N and D."""

    @property
    def exponent(self) -> float:
        """a in N ∝ C^a."""

    def parameters(self, flops: float) -> float:
        """The best N of a budget."""

    def flops(self, parameters: float) -> float:
        """The budget of which `parameters` is the best size."""

    def optimal_loss(self, flops: float) -> float | None:
        """The loss at the best split of a budget; None where the law predicts none."""

    def loss(self, parameters: float, tokens: float) -> float | None:
        """The loss of any N and D; None where the law knows the frontier alone."""

    def tokens(self, parameters: float, loss: float) -> float | None:
        """The D with which N reaches `loss`: infinite if it never does, None where the law predicts no losses."""


def optimum(law: Law, flops: float) -> Optimum:
    """The best split of a budget."""
    n = law.parameters(flops)
    return Optimum(n, flops / (6 * n), law.optimal_loss(flops))


def flops_of_tokens(law: Law, tokens: float) -> float:
    """The budget of which `tokens` is the best number: D = C / 6N grows as C^(1 - a), so one budget gives the scale."""
    unit = 1e18
    return unit * power(tokens * 6 * law.parameters(unit) / unit, 1 / (1 - law.exponent))


@dataclass(frozen=True)
class Surface:
    """loss = E + A / N^alpha + B / D^beta, in nats per token (Hoffmann et al., 2203.15556, approach 3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def exponent(self) -> float:
        """beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def parameters(self, flops: float) -> float:
        """G (C/6)^a with G = (alpha A / beta B)^(1 / (alpha + beta)): there both terms fall equally fast."""
        return self._scale() * power(flops / 6, self.exponent)

    def flops(self, parameters: float) -> float:
        """The inverse of `parameters`."""
        return 6 * power(parameters / self._scale(), 1 / self.exponent)

    def _scale(self) -> float:
        return power(self.alpha * self.A / (self.beta * self.B), 1 / (self.alpha + self.beta))

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A * power(parameters, -self.alpha) + self.B * power(tokens, -self.beta)

    def optimal_loss(self, flops: float) -> float:
        """The least loss of a budget."""
        n = self.parameters(flops)
        return self.loss(n, flops / (6 * n))

    def tokens(self, parameters: float, loss: float) -> float:
        """Solved for D."""
        left = loss - self.E - self.A * power(parameters, -self.alpha)
        return power(self.B / left, 1 / self.beta) if left > 0 else math.inf


@dataclass(frozen=True)
class KaplanSurface:
    """loss = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al., 2001.08361, equation 1.5)."""

    alpha_N: float
    alpha_D: float
    N_c: float
    D_c: float

    @property
    def exponent(self) -> float:
        """alpha_D / (alpha_N + alpha_D): of this surface under C = 6 N D, not the published .73 (see `published`)."""
        return self.alpha_D / (self.alpha_N + self.alpha_D)

    def parameters(self, flops: float) -> float:
        """Where the derivative of (N_c/N)^p + 6 D_c N / C vanishes, p = alpha_N / alpha_D."""
        p = self.alpha_N / self.alpha_D
        return power(p * flops / (6 * self.D_c), 1 / (1 + p)) * power(self.N_c, p / (1 + p))

    def flops(self, parameters: float) -> float:
        """The inverse of `parameters`."""
        p = self.alpha_N / self.alpha_D
        return power(parameters, 1 + p) * 6 * self.D_c / (p * power(self.N_c, p))

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token; infinite `parameters` or `tokens` give L(D) and L(N)."""
        size = power(self.N_c / parameters, self.alpha_N / self.alpha_D)
        return power(size + self.D_c / tokens, self.alpha_D)

    def optimal_loss(self, flops: float) -> float:
        """The least loss of a budget."""
        n = self.parameters(flops)
        return self.loss(n, flops / (6 * n))

    def tokens(self, parameters: float, loss: float) -> float:
        """Solved for D."""
        left = power(loss, 1 / self.alpha_D) - power(self.N_c / parameters, self.alpha_N / self.alpha_D)
        return self.D_c / left if left > 0 else math.inf


@dataclass(frozen=True)
class Frontier:
    """N = scale (C / unit)^exponent, and where `loss_exponent` is set loss = (loss_flops / C)^loss_exponent."""

    scale: float
    exponent: float
    unit: float = 1.0
    loss_flops: float = 0.0
    loss_exponent: float = 0.0

    @classmethod
    def through(cls, first: tuple[float, float], last: tuple[float, float]) -> Frontier:
        """The line through two (N, C) in logarithms."""
        (n1, c1), (n2, c2) = first, last
        return cls(n1, math.log(n2 / n1) / math.log(c2 / c1), c1)

    def parameters(self, flops: float) -> float:
        """The best N of a budget."""
        return self.scale * power(flops / self.unit, self.exponent)

    def flops(self, parameters: float) -> float:
        """The inverse of `parameters`."""
        return self.unit * power(parameters / self.scale, 1 / self.exponent)

    def optimal_loss(self, flops: float) -> float | None:
        """On the frontier, if a law of the loss came with it."""
        return power(self.loss_flops / flops, self.loss_exponent) if self.loss_exponent else None

    def loss(self, parameters: float, tokens: float) -> None:
        """A frontier knows no loss beside itself."""

    def tokens(self, parameters: float, loss: float) -> None:
        """A frontier knows no loss beside itself."""


KINDS: dict[str, type[Surface | KaplanSurface | Frontier]] = {
    "surface": Surface,
    "kaplan": KaplanSurface,
    "frontier": Frontier,
}


def to_json(law: Surface | KaplanSurface | Frontier) -> dict[str, Any]:
    """Its kind and coefficients."""
    kind = next(name for name, made in KINDS.items() if type(law) is made)
    return {"kind": kind, **asdict(law)}


def from_json(value: Mapping[str, Any]) -> Surface | KaplanSurface | Frontier:
    """What `to_json` wrote; KeyError, TypeError or ValueError for anything else, a negative coefficient too."""
    law = KINDS[value["kind"]](**{name: float(item) for name, item in value.items() if name != "kind"})
    for name, number in asdict(law).items():
        lowest = 0.0 if name.startswith("loss_") else -math.inf if name == "exponent" else 1e-300
        if not (math.isfinite(number) and number >= lowest):
            raise ValueError(f"{name} is {number}")
    return law
