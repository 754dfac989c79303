"""The runs that a law is fitted to: parameters, tokens, loss, operations, and the curve of each where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmctl.errors import InputError, UsageError

BUDGET_TOLERANCE = 0.1
"""Runs whose budgets differ by less than this share belong to one isoFLOP profile."""


@dataclass(frozen=True)
class Run:
    """One training: what it ended with, and what it passed on its way."""

    name: str
    parameters: float
    tokens: float
    loss: float
    flops: float
    curve: tuple[tuple[float, float], ...] = ()
    """(tokens, loss) in the order of training, the end included; empty if only the end is known."""


@dataclass(frozen=True)
class Runs:
    """Runs that can be compared: one data set, one way of counting."""

    rows: tuple[Run, ...]
    counts: str
    """What their parameters count: a key of `published.COUNTS`, or the name of a column."""
    flops: str = "6ND"
    """How operations were counted."""
    notes: tuple[str, ...] = field(default=())
    """What a reader should know about them."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parameters(self) -> np.ndarray:
        """(runs,)"""
        return np.array([row.parameters for row in self.rows])

    @property
    def tokens(self) -> np.ndarray:
        """(runs,)"""
        return np.array([row.tokens for row in self.rows])

    @property
    def loss(self) -> np.ndarray:
        """(runs,)"""
        return np.array([row.loss for row in self.rows])

    @property
    def flops_used(self) -> np.ndarray:
        """(runs,)"""
        return np.array([row.flops for row in self.rows])

    def without_outliers(self, highest: int = 0, above: float | None = None) -> Runs:
        """Without the runs whose loss is at or above the `highest`-th largest, and those whose loss exceeds `above`.

        UsageError if nothing would be left.
        """
        losses = sorted(row.loss for row in self.rows)
        if highest >= len(losses):
            raise UsageError(f"there are {len(losses)} runs, all would be dropped", hint="lower --drop-highest")
        limit = losses[-highest] if highest else np.inf
        kept = tuple(row for row in self.rows if row.loss < limit and (above is None or row.loss <= above))
        if not kept:
            raise UsageError("no run is left", hint=f"the losses are {losses[0]:.4g} to {losses[-1]:.4g}")
        dropped = len(self.rows) - len(kept)
        rule = [f"at or above the {highest} highest"] if highest else []
        rule += [] if above is None else [f"above {above:g}"]
        note = f"{dropped} of {len(self.rows)} runs dropped by their loss: {', '.join(rule)}"
        return replace(self, rows=kept, notes=(*self.notes, note) if rule else self.notes)

    def budgets(self, tolerance: float = BUDGET_TOLERANCE) -> list[np.ndarray]:
        """Indices of the runs of each budget, by rising budget: neighbours within `tolerance` of the first are one."""
        order = np.argsort(self.flops_used, kind="stable")
        groups: list[list[int]] = []
        for index in order:
            near = groups and self.rows[index].flops <= self.rows[groups[-1][0]].flops * (1 + tolerance)
            if near:
                groups[-1].append(int(index))
            else:
                groups.append([int(index)])
        return [np.array(group) for group in groups]


def checked(rows: Iterable[Run], counts: str, flops: str = "6ND", notes: Sequence[str] = ()) -> Runs:
    """Runs whose numbers are positive and finite; InputError names the first that is not."""
    found = tuple(rows)
    for row in found:
        for name in ("parameters", "tokens", "loss", "flops"):
            value = getattr(row, name)
            if not (np.isfinite(value) and value > 0):
                raise InputError(f"{row.name}: {name} is {value:g}", hint="every number of a run must be positive")
    if not found:
        raise InputError("there are no runs", hint="give a table, or PIPELINE/STAGE of trainings")
    return Runs(found, counts, flops, tuple(notes))
