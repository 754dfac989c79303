"""Which variants are best at what, and which of them no other one beats; medians and what they are worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from llmctl_eval.intervals import Interval

SMALLER = ("bytes", "first_token_ms", "step_ms", "peak_memory_bytes", "bits_per_byte")
"""Columns of which less is better."""
LARGER = ("tokens_per_s", "top1_agreement")
"""Columns of which more is better."""
WEIGHED = ("bits_per_byte", "step_ms", "bytes")
"""What is traded off: quality, speed, size."""
Numbers = Mapping[str, float]
"""What was measured of a variant, by column; a column that was not measured is absent."""


def best(found: Mapping[str, Numbers], column: str) -> list[str]:
    """The variants with the best value of a column, several if they are equal; none if nobody has it."""
    values = {name: numbers[column] for name, numbers in found.items() if column in numbers}
    if not values:
        return []
    wanted = max(values.values()) if column in LARGER else min(values.values())
    return [name for name, value in values.items() if value == wanted]


def pareto(found: Mapping[str, Numbers]) -> list[str]:
    """The variants that no other one beats: as good in all of `WEIGHED`, and better in one.

    A value that is missing is the worst there is; one that all lack takes no part. Equal variants stay together.
    """
    costs = {name: [numbers.get(column, math.inf) for column in WEIGHED] for name, numbers in found.items()}

    def beaten(own: Sequence[float]) -> bool:
        return any(all(a <= b for a, b in zip(one, own, strict=True)) and one != own for one in costs.values())

    return [name for name, own in costs.items() if not beaten(own)]


def quartiles(values: Sequence[float]) -> Interval:
    """The median, between the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Interval(middle, low, high)


def median_ratio(values: Sequence[float], firsts: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median of the ratios turn by turn, in the distribution-free interval of a median.

    Its ends are the k-th smallest and k-th largest ratio, with the largest k that keeps the confidence: the median lies
    outside with probability `2 P(Binomial(n, 1/2) < k)` (David & Nagaraja, Order Statistics, section 7.1).
    """
    ratios = sorted(value / first for value, first in zip(values, firsts, strict=True))
    count, outside, k = len(ratios), 0.0, 0
    while True:
        outside += 2 * math.comb(count, k) / 2**count
        if outside > 1 - confidence:
            break
        k += 1
    if k == 0:
        raise ValueError(f"{count} ratios have no {confidence:.0%} interval of their median")
    return Interval(statistics.median(ratios), ratios[k - 1], ratios[-k])
