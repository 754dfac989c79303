"""BFGS for many starts at once: each row of an array is a minimisation of its own, all advance in step.

One pass of numpy serves all of them, so a full grid of starts, or a thousand resamples, costs little more than one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(points (S, P), their rows (S,)) → values (S,) and gradients (S, P); a row says which problem a point belongs to."""

SUFFICIENT, CURVATURE = 1e-4, 0.9
"""Weak Wolfe conditions: share of the predicted fall, and of the slope, that a step must leave behind."""
TRIALS = 40


@dataclass(frozen=True)
class Minima:
    """Where every row ended."""

    points: np.ndarray
    """(S, P)"""
    values: np.ndarray
    """(S,)"""
    gradients: np.ndarray
    """(S,): the largest entry of each gradient."""


def minimise(objective: Objective, starts: np.ndarray, *, iterations: int = 400, tolerance: float = 1e-8) -> Minima:
    """Minimise from every row of `starts` (S, P).

    A row ends when no entry of its gradient exceeds `tolerance`, or when no step along its direction lowers the value
    in floating point any more. `objective` should be scaled so that its gradients are near 1 far from the minimum: an
    absolute tolerance of a badly scaled objective is how the published fit of Chinchilla's approach 3 ended early.
    """
    points = np.array(starts, dtype=np.float64)
    count, width = points.shape
    rows = np.arange(count)
    values, gradients = objective(points, rows)
    inverse = np.tile(np.eye(width), (count, 1, 1))
    fresh = np.ones(count, dtype=bool)
    alive = np.abs(gradients).max(axis=1) > tolerance
    for _ in range(iterations):
        at = rows[alive]
        if not len(at):
            break
        uphill = np.einsum("si,sij,sj->s", gradients[at], inverse[at], gradients[at]) <= 0
        inverse[at[uphill]], fresh[at[uphill]] = np.eye(width), True
        was_fresh = fresh[at]
        direction = -np.einsum("sij,sj->si", inverse[at], gradients[at])
        first = np.where(was_fresh, np.minimum(1.0, 1 / np.abs(direction).max(axis=1)), 1.0)
        step, lower, new = _search(objective, _Ray(at, points[at], direction, values[at], gradients[at]), first)
        moved = step > 0
        change = step[:, None] * direction
        inverse[at] = _updated(inverse[at], change, new - gradients[at], was_fresh)
        points[at], values[at], gradients[at] = points[at] + change, lower, new
        # A row that could not move tries once more along its steepest descent, then ends.
        inverse[at[~moved]] = np.eye(width)
        fresh[at] = ~moved
        alive[at] = (np.abs(new).max(axis=1) > tolerance) & (moved | ~was_fresh)
    return Minima(points, values, np.abs(gradients).max(axis=1))


@dataclass(frozen=True)
class _Ray:
    """Where each row stands and where it is going."""

    rows: np.ndarray
    points: np.ndarray
    direction: np.ndarray
    values: np.ndarray
    gradients: np.ndarray


def _search(objective: Objective, ray: _Ray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, values, gradients) that meet the weak Wolfe conditions, by bisection and doubling from `first`.

    Where that fails it is the lowest point seen; the step is 0 where nothing lower was seen.
    """
    count = len(ray.rows)
    slope = np.einsum("si,si->s", ray.direction, ray.gradients)
    low, high, step = np.zeros(count), np.full(count, np.inf), first.copy()
    best_step, best, best_gradients = np.zeros(count), ray.values.copy(), ray.gradients.copy()
    open_ = np.arange(count)
    for _ in range(TRIALS):
        where = ray.points[open_] + step[open_, None] * ray.direction[open_]
        trial, gradients = objective(where, ray.rows[open_])
        enough = trial <= ray.values[open_] + SUFFICIENT * step[open_] * slope[open_]
        steep = np.einsum("si,si->s", gradients, ray.direction[open_]) < CURVATURE * slope[open_]
        lower = enough & (trial < best[open_])
        chosen = open_[lower]
        best_step[chosen], best[chosen], best_gradients[chosen] = step[chosen], trial[lower], gradients[lower]
        high[open_[~enough]] = step[open_[~enough]]
        low[open_[enough]] = step[open_[enough]]
        open_ = open_[~enough | steep]
        if not len(open_):
            break
        bounded = np.isfinite(high[open_])
        middle = (low[open_] + np.where(bounded, high[open_], 0)) / 2
        step[open_] = np.where(bounded, middle, 2 * step[open_])
    return best_step, best, best_gradients


def _updated(inverse: np.ndarray, change: np.ndarray, turn: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The inverse Hessians after a step: BFGS's update, left out where the curvature along the step is not positive.

    Before the `first` update the identity is scaled to the curvature just seen.
    """
    curvature = np.einsum("si,si->s", change, turn)
    good = curvature > 1e-14 * np.einsum("si,si->s", turn, turn)
    if not good.any():
        return inverse
    out = inverse.copy()
    s, y, sy = change[good], turn[good], curvature[good]
    scale = np.where(first[good], sy / np.einsum("si,si->s", y, y), 1.0)
    h = inverse[good] * scale[:, None, None]
    left = np.eye(change.shape[1]) - np.einsum("si,sj->sij", s, y) / sy[:, None, None]
    out[good] = left @ h @ left.transpose(0, 2, 1) + np.einsum("si,sj->sij", s, s) / sy[:, None, None]
    return out
