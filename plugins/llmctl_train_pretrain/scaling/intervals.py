"""Numbers with the bounds that resampling the runs gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SAMPLES = 20
"""Fewer resamples that could be fitted give no interval."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; without bounds where too few resamples could be fitted."""

    value: float
    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number lies in the interval."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high

    def to_json(self) -> dict[str, float | None]:
        """The three numbers."""
        return {"value": self.value, "low": self.low, "high": self.high}


def estimate(value: float, samples: np.ndarray | Sequence[float], level: float) -> Estimate:
    """`value` between the percentiles of its resamples that hold the share `level` of them."""
    if len(samples) < LEAST_SAMPLES:
        return Estimate(value)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def resampled(runs: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, runs): how often each resample, drawn with replacement, holds each run."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(runs, np.full(runs, 1 / runs), size=resamples).astype(np.float64)
