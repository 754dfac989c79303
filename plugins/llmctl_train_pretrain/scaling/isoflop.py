"""Chinchilla's approach 2: at each budget a parabola of the loss in log N, and a power law through its minima."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmctl_train_pretrain.scaling.laws import Frontier
from llmctl_train_pretrain.scaling.runs import Runs

LEAST_SIZES = 3
"""A parabola needs as many."""


@dataclass(frozen=True)
class Profile:
    """The runs of one budget and the parabola through them, loss = c0 + c1 x + c2 x^2 with x = log N - centre."""

    flops: float
    rows: np.ndarray
    """Indices of its runs."""
    centre: float
    coefficients: tuple[float, float, float]
    parameters: float
    """Where the parabola is least."""
    loss: float

    def to_json(self) -> dict[str, float]:
        """What a table of budgets shows."""
        return {"flops": self.flops, "runs": len(self.rows), "parameters": self.parameters, "loss": self.loss}

    def at(self, parameters: float) -> float:
        """The parabola."""
        x = np.log(parameters) - self.centre
        return float(np.polyval(self.coefficients[::-1], x))


@dataclass(frozen=True)
class ProfileFit:
    """The profiles that have a minimum among their sizes, and the frontier through these minima."""

    frontier: Frontier
    profiles: tuple[Profile, ...]
    left_out: tuple[str, ...]
    """Why each other budget has none."""
    samples: np.ndarray
    """(R, 2): exponent and log N at the budget `top`, of every resample with two budgets that have a minimum."""


def fit_profiles(runs: Runs, *, top: float, resamples: int, seed: int, tolerance: float) -> ProfileFit | None:
    """None if fewer than two budgets have a minimum. Resamples draw the runs of each budget anew, with replacement."""
    profiles, left_out = [], []
    for rows in runs.budgets(tolerance):
        profile = _profile(runs, rows)
        if isinstance(profile, str):
            left_out.append(profile)
        else:
            profiles.append(profile)
    if len(profiles) < 2:
        return None
    frontier = _frontier(profiles)
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(resamples):
        drawn = (_profile(runs, generator.choice(p.rows, len(p.rows))) for p in profiles)
        found = [profile for profile in drawn if isinstance(profile, Profile)]
        if len(found) >= 2:
            again = _frontier(found)
            samples.append((again.exponent, np.log(again.parameters(top))))
    return ProfileFit(frontier, tuple(profiles), tuple(left_out), np.array(samples).reshape(-1, 2))


def _profile(runs: Runs, rows: np.ndarray) -> Profile | str:
    """The parabola of one budget, or why there is none."""
    flops = float(np.exp(np.log(runs.flops_used[rows]).mean()))
    x, y = np.log(runs.parameters[rows]), runs.loss[rows]
    sizes = np.unique(x)
    if len(sizes) < LEAST_SIZES:
        return f"{flops:.3g} operations: {len(sizes)} sizes, a parabola needs {LEAST_SIZES}"
    centre = float(x.mean())
    c2, c1, c0 = (float(value) for value in np.polyfit(x - centre, y, 2))
    if c2 <= 0:
        return f"{flops:.3g} operations: the losses have no minimum over the sizes"
    least = -c1 / (2 * c2)
    if not sizes[0] <= least + centre <= sizes[-1]:
        side = "smallest" if least + centre < sizes[0] else "largest"
        return f"{flops:.3g} operations: the minimum lies beyond the {side} size"
    n = float(np.exp(least + centre))
    return Profile(flops, rows, centre, (c0, c1, c2), n, c0 - c1**2 / (4 * c2))


def _frontier(profiles: list[Profile]) -> Frontier:
    flops = np.log([profile.flops for profile in profiles])
    slope, _ = np.polyfit(flops - flops.mean(), np.log([profile.parameters for profile in profiles]), 1)
    height = np.mean(np.log([profile.parameters for profile in profiles]))
    return Frontier(float(np.exp(height)), float(slope), float(np.exp(flops.mean())))
