"""Kaplan's power laws: the joint law of size and data, and that of compute along the best runs of each budget."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from llmctl_train_pretrain.scaling.bfgs import minimise
from llmctl_train_pretrain.scaling.laws import PF_DAY, KaplanSurface
from llmctl_train_pretrain.scaling.parametric import DELTA

GRID = tuple(product((0.05, 0.1, 0.2, 0.4), (0.05, 0.1, 0.2, 0.4), (0.0, 4.0, 8.0, 16.0), (0.0, 4.0, 8.0, 16.0)))
"""Starts (alpha_N, alpha_D, log N_c - mean log N, log D_c - mean log D)."""


@dataclass(frozen=True)
class KaplanFit:
    """A fitted joint law."""

    surface: KaplanSurface
    objective: float
    samples: np.ndarray
    """(R, 4): alpha_N, alpha_D, N_c, D_c of every resample with positive exponents."""


class _Problem:
    """Sum of Huber losses of log residuals over DELTA, in (log alpha_N, log alpha_D, centred log N_c and log D_c).

    log loss = alpha_D logsumexp(p (log N_c - log N), log D_c - log D) with p = alpha_N / alpha_D.
    """

    def __init__(self, parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> None:
        n, d = np.log(parameters), np.log(tokens)
        self.centre = np.array([n.mean(), d.mean()])
        self.n, self.d, self.log_loss = n - self.centre[0], d - self.centre[1], np.log(loss)

    def __call__(self, points: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Values (S,) and gradients (S, 4); `weights` (S, runs) count each run. A trial that overflows is infinite."""
        with np.errstate(all="ignore"):
            values, gradients = self._plain_values(points, weights)
        bad = ~(np.isfinite(values) & np.isfinite(gradients).all(axis=1))
        return np.where(bad, np.inf, values), np.where(bad[:, None], 0.0, gradients)

    def _plain_values(self, points: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        alpha_n, alpha_d = np.exp(points[:, [0]]), np.exp(points[:, [1]])
        p = alpha_n / alpha_d
        far = points[:, [2]] - self.n
        size, data = p * far, points[:, [3]] - self.d
        both = np.logaddexp(size, data)
        share = np.exp(size - both)
        residual = alpha_d * both - self.log_loss
        clipped = np.clip(residual, -DELTA, DELTA)
        huber, pull = clipped * (residual - clipped / 2) / DELTA, clipped / DELTA
        if weights is not None:
            huber, pull = huber * weights, pull * weights
        pull = pull * alpha_d
        gradients = [
            (pull * share * size).sum(1),
            (pull * (both - share * size)).sum(1),
            (pull * share * p).sum(1),
            (pull * (1 - share)).sum(1),
        ]
        return huber.sum(axis=1), np.stack(gradients, axis=1)

    def plain(self, points: np.ndarray) -> np.ndarray:
        """(S, 4): alpha_N, alpha_D, N_c, D_c."""
        out = points.copy()
        out[:, 2:] += self.centre
        found: np.ndarray = np.exp(out)
        return found


def fit_kaplan(
    parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray, *, weights: np.ndarray | None = None
) -> KaplanFit | None:
    """The joint law (2001.08361, equation 1.5) with the least sum of Huber losses of log residuals.

    It goes to zero with endless size and data: a loss with a floor bends away from it. None without a finite minimum.
    """
    problem = _Problem(parameters, tokens, loss)
    starts = np.array(GRID)
    starts[:, :2] = np.log(starts[:, :2])
    found = minimise(lambda at, _: problem(at), starts)
    best = int(np.argmin(found.values))
    with np.errstate(over="ignore"):
        ended = problem.plain(found.points[[best]])[0]
    if not np.isfinite(ended).all():
        return None
    samples = np.empty((0, 4))
    if weights is not None and len(weights):
        again = minimise(lambda at, rows: problem(at, weights[rows]), np.tile(found.points[best], (len(weights), 1)))
        with np.errstate(over="ignore"):
            samples = problem.plain(again.points)
        samples = samples[np.isfinite(samples).all(axis=1)]
    alpha_n, alpha_d, n_c, d_c = (float(value) for value in ended)
    surface = KaplanSurface(alpha_N=alpha_n, alpha_D=alpha_d, N_c=n_c, D_c=d_c)
    return KaplanFit(surface, float(found.values[best]) * DELTA, samples)


@dataclass(frozen=True)
class ComputeLaw:
    """loss = (C_c / C)^alpha_C along the best split of each budget (2001.08361, equation 1.3)."""

    alpha_C: float
    C_c: float
    """In PF-days."""


def fit_compute(flops: np.ndarray, loss: np.ndarray) -> ComputeLaw:
    """The line in logarithms through the best loss of each budget; it takes two budgets."""
    slope, height = np.polyfit(np.log(flops / PF_DAY), np.log(loss), 1)
    return ComputeLaw(float(-slope), float(np.exp(-height / slope)))
