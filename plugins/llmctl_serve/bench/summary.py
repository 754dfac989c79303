"""The numbers of a load: percentiles with intervals, rates, goodput, errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl import UsageError
from llmctl.console import human_seconds
from llmctl_serve.bench.load import Load, Record

LEVELS = (50, 90, 95, 99)
CONFIDENCE = 0.95
RESAMPLES = 200
MEASURES = ("ttft", "itl", "tpot", "e2e")
LATE = 0.005
"""Seconds that the client itself may be late at its 99th percentile before it is said."""
UNITS = {"ms": 0.001, "s": 1.0}


def split_list(text: str) -> list[str]:
    """The parts between commas, without blanks. An empty part stays: whoever reads it must refuse it."""
    return [part.strip() for part in text.split(",")]


def parse_limits(text: str) -> dict[str, float]:
    """`ttft=200ms,itl=50ms,e2e=5s` in seconds.

    UsageError for other names, names that come twice, numbers without a unit, and where there is no limit at all.
    """
    limits: dict[str, float] = {}
    for part in split_list(text):
        name, _, value = part.partition("=")
        unit = "ms" if value.endswith("ms") else "s" if value.endswith("s") else ""
        try:
            seconds = float(value.removesuffix(unit)) * UNITS[unit]
        except (ValueError, KeyError):
            seconds = math.nan
        if name not in MEASURES or not 0 < seconds < math.inf:
            names = ", ".join(MEASURES)
            raise UsageError(f"`{part}` is no limit", hint=f"for example ttft=200ms,itl=50ms,e2e=5s (of {names})")
        if name in limits:
            raise UsageError(f"`{name}` has two limits", hint="leave one of them out")
        limits[name] = seconds
    return limits


def meets(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether a request was answered within all limits; `itl` bounds its longest gap."""
    if not record.ok:
        return False
    values = {"ttft": record.ttft, "itl": max(record.gaps, default=0.0), "tpot": record.tpot or 0.0, "e2e": record.e2e}
    return all(values[name] <= limit for name, limit in limits.items())


@dataclass(frozen=True)
class Quantile:
    """A percentile and its 95 % interval; an end that the sample is too small for is None."""

    value: float
    low: float | None
    high: float | None


def quantile(values: Sequence[float], level: float) -> Quantile:
    """A percentile of independent values; the interval is that of order statistics and assumes no distribution.

    Its ends are `x[k]` with `k` from the binomial distribution of how many values lie below the percentile (David and
    Nagaraja, Order Statistics, 7.1), as in `scipy.stats.quantile_test`.
    """
    ordered = sorted(values)
    share, tail = level / 100, (1 - CONFIDENCE) / 2
    low = _binomial_quantile(len(ordered), share, tail) - 1
    high = _binomial_quantile(len(ordered), share, 1 - tail)
    return Quantile(
        float(np.percentile(ordered, level)),
        ordered[low] if low >= 0 else None,
        ordered[high] if high < len(ordered) else None,
    )


def _binomial_quantile(n: int, p: float, level: float) -> int:
    """The smallest k with P(X <= k) >= level for X of n draws with probability p."""
    total = 0.0
    for k in range(n + 1):
        logarithm = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(logarithm + k * math.log(p) + (n - k) * math.log1p(-p))
        if total >= level * (1 - 1e-12):
            return k
    return n


def pooled_quantiles(groups: Sequence[Sequence[float]]) -> dict[int, Quantile]:
    """Percentiles of values that belong together in groups, as the gaps of one answer do.

    The interval is a bootstrap over the groups: values of one answer are alike, and would make it too narrow.
    """
    arrays = [np.asarray(group) for group in groups if len(group)]
    rng = np.random.default_rng(0)
    draws = [
        np.percentile(np.concatenate([arrays[i] for i in rng.integers(0, len(arrays), len(arrays))]), LEVELS)
        for _ in range(RESAMPLES)
    ]
    tail = 100 * (1 - CONFIDENCE) / 2
    ends = np.percentile(draws, (tail, 100 - tail), axis=0)
    values = np.percentile(np.concatenate(arrays), LEVELS)
    return {
        level: Quantile(float(value), float(low), float(high))
        for level, value, low, high in zip(LEVELS, values, *ends, strict=True)
    }


def _described(values: Sequence[float], found: Mapping[int, Quantile]) -> dict[str, Any]:
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        "max": max(values),
        **{f"p{level}": one.value for level, one in found.items()},
        "intervals": {f"p{level}": [one.low, one.high] for level, one in found.items()},
    }


def summarise(load: Load, records: Sequence[Record], limits: Mapping[str, float]) -> dict[str, Any]:
    """Everything that is reported of one load; times in seconds. Latencies are those of answered requests."""
    good = [record for record in records if record.ok]
    failed = [record for record in records if record.error and not record.rejected]
    took = max(record.end for record in records) - min(record.intended for record in records)
    new, read = sum(record.count for record in good), sum(record.prompt_tokens or 0 for record in good)
    found: dict[str, Any] = {
        "load": load.label,
        "kind": load.kind,
        "value": load.value,
        "burst": load.burst,
        "requests": len(records),
        "answered": len(good),
        "failed": len(failed),
        "errors": dict(Counter(record.error for record in failed).most_common()),
        "error_examples": {record.error: record.message for record in failed},
        "rejected": describe_rejects([record for record in records if record.rejected]),
        "seconds": took,
        "requests_per_s": len(good) / took,
        "output_tokens_per_s": new / took,
        "prompt_tokens_per_s": read / took,
        "output_tokens": new,
        "prompt_tokens": read,
        "uncounted": sum(record.completion_tokens is None for record in good),
    }
    values = {
        "ttft": [record.ttft for record in good],
        "tpot": [record.tpot for record in good if record.tpot is not None],
        "e2e": [record.e2e for record in good],
    }
    for name, some in values.items():
        if some:
            found[name] = _described(some, {level: quantile(some, level) for level in LEVELS})
    gaps = [record.gaps for record in good]
    if any(gaps):
        found["itl"] = _described([gap for some in gaps for gap in some], pooled_quantiles(gaps))
    if limits:
        met = sum(meets(record, limits) for record in records)
        found["goodput"] = {"limits": dict(limits), "share": met / len(records), "requests_per_s": met / took}
    lags = [record.sent - record.intended for record in records]
    found["client_lag"] = {"p99": float(np.percentile(lags, 99)), "max": max(lags)}
    return found


def describe_rejects(records: Sequence[Record]) -> dict[str, Any]:
    """Requests that were turned away, by status, and after how many seconds the server wants them again."""
    kinds = {}
    for kind, count in Counter(str(record.error) for record in records).most_common():
        some = [record for record in records if record.error == kind]
        hints = [record.retry_after for record in some if record.retry_after is not None]
        kinds[kind] = {
            "requests": count,
            "hinted": len(hints),
            "retry_after": {"min": min(hints), "median": float(np.median(hints)), "max": max(hints)} if hints else None,
            "example": some[-1].message,
        }
    return {"requests": len(records), "kinds": kinds}


def hint_text(kind: Mapping[str, Any]) -> str:
    """`to come back in 1.0 s to 3.0 s`, and how many were told nothing."""
    hints, silent = kind["retry_after"], kind["requests"] - kind["hinted"]
    if hints is None:
        return "no retry hint"
    low, high = human_seconds(hints["min"]), human_seconds(hints["max"])
    said = f"to come back in {low if low == high else f'{low} to {high}'}"
    return f"{said} ({silent} without a hint)" if silent else said


def add_speed_up(loads: Sequence[dict[str, Any]]) -> None:
    """Say of each closed load how its tokens per second compare with those of the first one.

    A Poisson load has none: what it delivers is what was asked for, as long as the server keeps up.
    """
    first = next((load["output_tokens_per_s"] for load in loads if load["kind"] == "closed"), 0.0)
    for load in loads:
        load["speed_up"] = load["output_tokens_per_s"] / first if first and load["kind"] == "closed" else None
