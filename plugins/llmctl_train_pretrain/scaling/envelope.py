"""Chinchilla's approach 1: the lower envelope of all training curves, and how large the model of each is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmctl_train_pretrain.scaling.laws import Frontier
from llmctl_train_pretrain.scaling.runs import Run, Runs

POINTS = 1500
"""Budgets between the first and the last, evenly spaced in logarithms, as in 2203.15556."""
LEAST_SIZES = 3


@dataclass(frozen=True)
class EnvelopeFit:
    """The lower envelope of all curves and the frontier through it."""

    frontier: Frontier
    flops: np.ndarray
    """(P,): the budgets at which a size between the smallest and the largest is best."""
    parameters: np.ndarray
    """(P,): the best size there."""
    loss: np.ndarray
    """(P,)"""
    sizes: int
    """How many different sizes are best somewhere."""
    samples: np.ndarray
    """(R, 2): exponent and log N at the budget `top`, of every resample that has a frontier."""


def fit_envelope(runs: Runs, *, top: float, resamples: int, seed: int) -> EnvelopeFit | str:
    """The fit, or why there is none. Resamples draw the runs anew, with replacement.

    Where the smallest or the largest size is best, a size that was not trained might be better: those budgets do not
    count. Curves are read at 6 N D operations, linearly in log C and log loss, never beyond their ends.
    """
    curves = [row for row in runs.rows if len(row.curve) > 1]
    if len({row.parameters for row in curves}) < LEAST_SIZES:
        return f"it needs curves of {LEAST_SIZES} sizes or more: rows along each run of a table, or eval_every"
    first = min(6 * row.parameters * row.curve[0][0] for row in curves)
    last = max(6 * row.parameters * row.curve[-1][0] for row in curves)
    grid = np.geomspace(first, last, POINTS)
    losses = np.stack([_read(row, grid) for row in curves])
    sizes = np.array([row.parameters for row in curves])
    found = _envelope(grid, sizes, losses)
    if found is None:
        return "it needs two sizes, between the smallest and the largest, that are each lowest at some budget"
    frontier, chosen, best, inner = found
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(resamples):
        drawn = np.unique(generator.integers(len(curves), size=len(curves)))
        again = _envelope(grid, sizes[drawn], losses[drawn])
        if again is not None:
            samples.append((again[0].exponent, np.log(again[0].parameters(top))))
    return EnvelopeFit(
        frontier,
        grid[inner],
        chosen[inner],
        best[inner],
        len(np.unique(chosen[inner])),
        np.array(samples).reshape(-1, 2),
    )


def _read(row: Run, grid: np.ndarray) -> np.ndarray:
    """The curve at each budget; infinite where it does not reach."""
    tokens, loss = np.array(row.curve).T
    flops = np.log(6 * row.parameters * tokens)
    found: np.ndarray = np.exp(np.interp(np.log(grid), flops, np.log(loss), left=np.inf, right=np.inf))
    return found


def _envelope(
    grid: np.ndarray, sizes: np.ndarray, losses: np.ndarray
) -> tuple[Frontier, np.ndarray, np.ndarray, np.ndarray] | None:
    """(frontier, best size and loss at every budget, which budgets count)."""
    best = losses.min(axis=0)
    chosen = sizes[losses.argmin(axis=0)]
    inner = np.isfinite(best) & (chosen > sizes.min()) & (chosen < sizes.max())
    if len(np.unique(chosen[inner])) < 2:
        return None
    x = np.log(grid[inner])
    slope, height = np.polyfit(x - x.mean(), np.log(chosen[inner]), 1)
    return Frontier(float(np.exp(height)), float(slope), float(np.exp(x.mean()))), chosen, best, inner
