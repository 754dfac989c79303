"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

UNHURRIED = 10_000
"""Steps that `inverse-sqrt` takes as its scale where there is no warm-up."""


def lr_factor(
    step: int, *, total: int, warmup: int, schedule: str, min_ratio: float = 0.0, decay_share: float = 0.5
) -> float:
    """Share of the peak rate at `step`, counted from 0, of `total` steps.

    Warm-up gives (step + 1) / warmup, so no step is taken at rate 0; it never covers more than the whole run. After it,
    with p from 0 to 1 over the rest: `cosine` falls as (1 + cos(pi p)) / 2 (1608.03983), `linear` as 1 - p, `wsd`
    stays at 1 and falls linearly over the last `decay_share` of all steps (MiniCPM, 2404.06395); these end at
    `min_ratio`. `constant` stays. `inverse-sqrt` falls as sqrt(w / step) with w the warm-up, or 10000 without one,
    whatever `total` is (1706.03762, 1910.10683), and not below `min_ratio`.
    """
    if step < min(warmup, total):
        return (step + 1) / min(warmup, total)
    if schedule == "inverse-sqrt":
        scale = warmup or UNHURRIED
        return max(min_ratio, math.sqrt(scale / (step + scale - warmup)))
    warmup = min(warmup, total)
    start = max(warmup, total - math.ceil(decay_share * total)) if schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    if schedule == "constant":
        fall = 1.0
    elif schedule == "cosine":
        fall = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule in ("linear", "wsd"):
        fall = 1.0 - progress
    else:
        raise ValueError(f"unknown schedule {schedule!r}")
    return min_ratio + (1.0 - min_ratio) * fall


def momentum_at(
    step: int, *, total: int, peak: float, start: float, warmup: int, end: float | None, decay_share: float
) -> float:
    """Momentum at `step`, counted from 0: from `start` to `peak` over `warmup` steps; to `end` over the last
    `decay_share` of all steps, unless it is None. Where both overlap the smaller."""
    rising = start + (peak - start) * min(1.0, step / warmup) if warmup else peak
    if end is None:
        return rising
    falls = math.ceil(decay_share * total)
    return min(rising, peak + (end - peak) * max(0.0, (step - total + falls) / falls))


def decay_factor(step: int, *, total: int, schedule: str) -> float:
    """Share of the weight decay at `step`, counted from 0: `constant`, or falling to 0 as `linear` or `cosine`."""
    progress = min(1.0, step / total)
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
