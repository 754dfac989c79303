"""Chinchilla's approach 3: loss = E + A / N^alpha + B / D^beta, fitted to log losses under a Huber loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from llmctl_train_pretrain.scaling.bfgs import minimise
from llmctl_train_pretrain.scaling.laws import LARGEST, Surface

DELTA = 1e-3
"""Where the Huber loss turns from square to linear, in nats of log loss (2203.15556, appendix D.2)."""
GRID = tuple(product((0, 5, 10, 15, 20, 25), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1), *[(0, 0.5, 1, 1.5, 2)] * 2))
"""Starts (log A, log B, log E, alpha, beta): the 4500 of 2203.15556."""
SURVIVORS = ((20, 512), (40, 64))
"""After so many iterations only so many of the lowest go on; the others end in the same minima or in worse ones."""
CHUNK = 1 << 15
"""Residuals computed at a time: arrays that stay in a core's cache, 1.6 times as fast."""
SAME = 1e-6
"""Minima whose objectives differ by less than this share are one."""


@dataclass(frozen=True)
class SurfaceFit:
    """A fitted surface and how sure it is."""

    surface: Surface
    objective: float
    """Sum of the runs' Huber losses."""
    gradient: float
    """The largest entry of the objective's gradient, over DELTA; far from the minimum it is near the number of runs."""
    agreeing: int
    """How many of the starts that were followed to the end lead to this minimum."""
    samples: np.ndarray
    """(R, 5): E, A, B, alpha, beta of every resample that has a minimum with positive exponents."""


class _Problem:
    """The objective over centred logarithms, in which the coefficients hang together far less: BFGS needs no scaling.

    Its parameters are log A - alpha mean(log N), log B - beta mean(log D), log E, alpha, beta.
    """

    def __init__(self, parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> None:
        n, d = np.log(parameters), np.log(tokens)
        self.centre = np.array([n.mean(), d.mean()])
        self.n, self.d, self.log_loss = n - self.centre[0], d - self.centre[1], np.log(loss)

    def centred(self, points: np.ndarray) -> np.ndarray:
        """Plain parameters (S, 5) as this problem has them."""
        out = np.array(points, dtype=np.float64)
        out[:, :2] -= out[:, 3:] * self.centre
        return out

    def plain(self, points: np.ndarray) -> np.ndarray:
        """The reverse of `centred`."""
        out = points.copy()
        out[:, :2] += out[:, 3:] * self.centre
        return out

    def __call__(self, points: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sum of Huber losses over DELTA (S,) and its gradients (S, 5); `weights` (S, runs) count each run."""
        size = max(1, CHUNK // len(self.n))
        parts = [slice(first, first + size) for first in range(0, len(points), size)]
        found = [self._part(points[part], None if weights is None else weights[part]) for part in parts]
        return np.concatenate([values for values, _ in found]), np.concatenate([gradients for _, gradients in found])

    def _part(self, points: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        a, b, e, alpha, beta = (points[:, [column]] for column in range(5))
        size, data = a - alpha * self.n, b - beta * self.d
        top = np.maximum(np.maximum(size, data), e)
        size, data, rest = np.exp(size - top), np.exp(data - top), np.exp(e - top)
        total = size + data + rest
        residual = top + np.log(total) - self.log_loss
        clipped = np.clip(residual, -DELTA, DELTA)
        huber = clipped * (residual - clipped / 2) / DELTA
        pull = clipped / (DELTA * total)
        if weights is not None:
            huber, pull = huber * weights, pull * weights
        of_size, of_data = pull * size, pull * data
        gradients = [of_size.sum(1), of_data.sum(1), (pull * rest).sum(1), -of_size @ self.n, -of_data @ self.d]
        return huber.sum(axis=1), np.stack(gradients, axis=1)


def fit_surface(
    parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray, *, weights: np.ndarray | None = None
) -> SurfaceFit | None:
    """The surface with the least sum of Huber losses of log residuals, from the whole grid of starts.

    `weights` (R, runs) are resamples, how often each holds each run; all are fitted from the minimum of the whole.
    None if the runs have no minimum with positive exponents: they do not tell the terms apart.
    """
    problem = _Problem(parameters, tokens, loss)
    points, done = problem.centred(np.array(GRID)), 0
    for iterations, survivors in SURVIVORS:
        found = minimise(lambda at, _: problem(at), points, iterations=iterations - done)
        points, done = found.points[np.argsort(found.values)[:survivors]], iterations
    found = minimise(lambda at, _: problem(at), points)
    ended = problem.plain(found.points)
    valid = _meaningful(ended)
    if not valid.any():
        return None
    best = int(np.argmin(np.where(valid, found.values, np.inf)))
    return SurfaceFit(
        surface=_surface(ended[best]),
        objective=float(found.values[best]) * DELTA,
        gradient=float(found.gradients[best]),
        agreeing=int((np.abs(found.values - found.values[best]) <= SAME * found.values[best] + 1e-12).sum()),
        samples=_resampled(problem, found.points[best], weights),
    )


def _resampled(problem: _Problem, start: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    if weights is None or not len(weights):
        return np.empty((0, 5))
    found = minimise(lambda at, rows: problem(at, weights[rows]), np.tile(start, (len(weights), 1)))
    ended = problem.plain(found.points)
    a, b, e, alpha, beta = ended[_meaningful(ended)].T
    return np.stack([np.exp(e), np.exp(a), np.exp(b), alpha, beta], axis=1)


def _meaningful(points: np.ndarray) -> np.ndarray:
    """(S,): whether both terms fall, and can be written as numbers."""
    return np.asarray((points[:, 3:] > 0).all(axis=1) & (np.abs(points[:, :3]) < LARGEST).all(axis=1))


def _surface(point: np.ndarray) -> Surface:
    a, b, e, alpha, beta = (float(value) for value in point)
    return Surface(E=float(np.exp(e)), A=float(np.exp(a)), B=float(np.exp(b)), alpha=alpha, beta=beta)
