"""Confidence intervals: the bias-corrected and accelerated bootstrap, exact ones where it has nothing to resample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CELLS = 10_000_000
"""Most resampled values in memory at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float

    def named(self, name: str, ends: str = ".") -> dict[str, float]:
        """As metrics: `name`, with `low` and `high` after `ends`."""
        return {name: self.value, f"{name}{ends}low": self.low, f"{name}{ends}high": self.high}


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made (Efron 1987). Equal seeds give equal intervals."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 1

    def mean(self, values: Sequence[float] | np.ndarray) -> Interval:
        """Of the mean of independent values.

        Values that are all 0 or all 1 cannot be resampled: there the interval is Clopper and Pearson's exact one.
        """
        sample = np.asarray(values, dtype=np.float64)
        value = float(sample.mean())
        if np.all(sample == sample[0]):
            if sample[0] in (0.0, 1.0):
                exact = stats.binomtest(int(sample.sum()), len(sample)).proportion_ci(self.confidence, method="exact")
                return Interval(value, float(exact.low), float(exact.high))
            return Interval(value, value, value)
        return self._interval(value, (sample,), lambda x, axis: np.mean(x, axis=axis))

    def difference(self, values: Sequence[float], reference: Sequence[float]) -> Interval:
        """Of the mean difference between paired values; no difference anywhere gives [0, 0]."""
        sample = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
        value = float(sample.mean())
        if np.all(sample == sample[0]):
            return Interval(value, value, value)
        return self._interval(value, (sample,), lambda x, axis: np.mean(x, axis=axis))

    def ratio(self, above: Sequence[float], below: Sequence[float]) -> Interval:
        """Of sum over sum of paired values, such as nats and tokens per document."""
        top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
        value = float(top.sum() / bottom.sum())
        if len(top) < 3 or np.allclose(top / bottom, value, rtol=1e-12):
            return Interval(value, value, value)
        return self._interval(value, (top, bottom), lambda x, y, axis: np.sum(x, axis=axis) / np.sum(y, axis=axis))

    def _interval(self, value: float, samples: tuple[np.ndarray, ...], statistic: object) -> Interval:
        found = stats.bootstrap(
            samples,
            statistic,
            paired=len(samples) > 1,
            vectorized=True,
            n_resamples=self.resamples,
            confidence_level=self.confidence,
            method="BCa",
            batch=max(1, CELLS // len(samples[0])),
            rng=np.random.default_rng(self.seed),
        ).confidence_interval
        return Interval(value, float(found.low), float(found.high))
