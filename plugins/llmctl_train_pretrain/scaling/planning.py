"""A plan: what to train with a budget, a size or a number of tokens, and what a choice away from the optimum costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmctl.errors import UsageError
from llmctl_train_pretrain.scaling.laws import Law, flops_of_tokens, optimum
from llmctl_train_pretrain.scaling.published import COUNTS, PUBLISHED, Coefficients
from llmctl_train_pretrain.scaling.shapes import Shape

EQUAL = 1e-3
"""A choice within this share of the optimal size is the optimum."""


@dataclass(frozen=True)
class Choice:
    """N, D and the loss that the law predicts for them, None if it predicts none."""

    parameters: float
    tokens: float
    loss: float | None

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6 * self.parameters * self.tokens

    def to_json(self) -> dict[str, float | None]:
        """Plain values."""
        return {
            "parameters": self.parameters,
            "tokens": self.tokens,
            "tokens_per_parameter": self.tokens / self.parameters,
            "flops": self.flops,
            "loss": self.loss,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The optimum of a budget, and where another size or number of tokens was asked for, what that costs."""

    coefficients: Coefficients
    budget: str
    """In words."""
    optimal: Choice
    chosen: Choice | None = None
    """At the same budget; None: the optimum itself."""
    same_loss: Choice | None = None
    """The chosen size with as many tokens as reach the optimal loss; infinite tokens if it never does."""
    shape: Shape | None = None
    preset: tuple[str, Shape] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def trained(self) -> Choice:
        """What the plan is about."""
        return self.chosen or self.optimal

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is infinite or unknown is null."""
        found: dict[str, Any] = {
            "coefficients": self.coefficients.name,
            "source": self.coefficients.source,
            "counts": self.coefficients.counts,
            "note": self.coefficients.note,
            "budget": self.budget,
            "optimal": self.optimal.to_json(),
            "chosen": self.chosen and self.chosen.to_json(),
            "same_loss": self.same_loss and self.same_loss.to_json() if self.reaches else None,
            "warnings": list(self.warnings),
        }
        for name, shape in (("shape", self.shape), ("preset", self.preset and self.preset[1])):
            found[name] = shape and {
                "config": shape.config.to_dict(),
                "parameters": shape.total,
                "counted": shape.counted,
                "flops_6nd": 6 * shape.counted * self.trained.tokens,
                "flops_counted": shape.flops(self.trained.tokens),
            }
        if self.preset:
            found["preset"]["name"] = self.preset[0]
        return found

    @property
    def reaches(self) -> bool:
        """Whether the chosen size ever reaches the optimal loss."""
        return self.same_loss is not None and math.isfinite(self.same_loss.tokens)


def make_plan(
    coefficients: Coefficients,
    *,
    flops: float | None = None,
    parameters: float | None = None,
    tokens: float | None = None,
    budget: str = "",
) -> Plan:
    """Two of budget, size and tokens fix a training; one alone is completed to an optimal one.

    UsageError for none or all three.
    """
    law = coefficients.law
    given = [value is not None for value in (flops, parameters, tokens)]
    if sum(given) not in (1, 2):
        raise UsageError("give a budget, --parameters or --tokens, or two of them: the third follows from C = 6 N D")
    if sum(given) == 1:
        total = _alone(law, flops, parameters, tokens)
        return _plan(coefficients, total, None, budget)
    n = parameters if parameters is not None else flops / (6 * tokens)  # type: ignore[operator]  # two are given
    d = tokens if tokens is not None else flops / (6 * n)  # type: ignore[operator]  # two are given
    return _plan(coefficients, 6 * n * d, Choice(n, d, law.loss(n, d)), budget)


def _alone(law: Law, flops: float | None, parameters: float | None, tokens: float | None) -> float:
    if flops is not None:
        return flops
    return law.flops(parameters) if parameters is not None else flops_of_tokens(law, float(tokens or 0))


def _plan(coefficients: Coefficients, flops: float, chosen: Choice | None, budget: str) -> Plan:
    law = coefficients.law
    best = optimum(law, flops)
    optimal = Choice(best.parameters, best.tokens, best.loss)
    same = None
    if chosen is not None and abs(math.log(chosen.parameters / optimal.parameters)) < EQUAL:
        chosen = None
    if chosen is not None and chosen.loss is not None and optimal.loss is not None:
        tokens = law.tokens(chosen.parameters, optimal.loss)
        same = None if tokens is None else Choice(chosen.parameters, tokens, optimal.loss)
    return Plan(
        coefficients=coefficients,
        budget=budget or f"{flops:.3g} operations",
        optimal=optimal,
        chosen=chosen,
        same_loss=same,
        warnings=tuple(_warnings(coefficients, flops)),
    )


def _warnings(coefficients: Coefficients, flops: float) -> list[str]:
    found = [f"{coefficients.name}: {coefficients.warning}"] if coefficients.warning else []
    if coefficients.name == "hoffmann":
        others = (optimum(PUBLISHED[name].law, flops) for name in ("hoffmann-unrounded", "besiroglu"))
        exact, again = (f"{size(best.parameters)} and {size(best.tokens)} tokens" for best in others)
        found.append(f"at this budget the unrounded figures give {exact}, besiroglu {again}")
    if flops > coefficients.largest:
        times = flops / coefficients.largest
        found.append(
            f"the budget is {times:.3g} times the largest that was fitted ({coefficients.largest:.2g}): extrapolated"
        )
    if coefficients.counts not in COUNTS:
        found.append(
            f"N counts what the {coefficients.counts} of the table says; the shape's count is of all parameters"
        )
    return found


def size(value: float) -> str:
    """A count as the field writes it: `935 k`, `124 M`, `72.2 B`, `1.33 T`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}" if value < 1000 * limit else f"{value / limit:.0f} {unit}"
    return f"{value:.3g}"
