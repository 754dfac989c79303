"""How fast training is: tokens per second, utilisation. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

# Dense bf16 tensor-core peaks of the vendors' data sheets, operations per second, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Tokens over duration; 0 when no time has passed."""
    return tokens / seconds if seconds > 0 else 0.0


def utilisation(flops_per_second: float, device: str) -> float | None:
    """Share of the device's bf16 peak (MFU, 2204.02311 appendix B); None for a device whose peak is not known."""
    # The longest name wins: "L40S" is no "L4".
    for name in sorted(PEAKS, key=len, reverse=True):
        if name in device:
            return flops_per_second / PEAKS[name]
    return None


class Throughput:
    """Counts tokens against a clock that only runs while training: validation and saving are taken out."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self.tokens = 0
        self.seconds = 0.0
        self._marked = (0, 0.0)

    def add(self, tokens: int) -> None:
        """Count the tokens of a finished step."""
        now = self._clock()
        self.seconds += now - self._since
        self._since = now
        self.tokens += tokens

    def skip(self) -> None:
        """Forget the time since the last call: it went into something else than training."""
        self._since = self._clock()

    def rate(self) -> float:
        """Tokens per second since the last call of `rate`, whole steps only."""
        tokens, seconds = self._marked
        self._marked = (self.tokens, self.seconds)
        return tokens_per_second(self.tokens - tokens, self.seconds - seconds)

    def overall(self) -> float:
        """Tokens per second since the beginning."""
        return tokens_per_second(self.tokens, self.seconds)
