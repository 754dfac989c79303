"""The course of a number in one line of a terminal."""

from __future__ import annotations

import math


class Course:
    """A number's course as a line of blocks: at most `2 * WIDTH` means of neighbours are kept, however long it gets."""

    WIDTH = 16
    BLOCKS = "▁▂▃▄▅▆▇█"

    def __init__(self) -> None:
        self._means: list[float] = []
        self._sum, self._count, self._per = 0.0, 0, 1

    def add(self, value: float) -> None:
        """The next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._per:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * self.WIDTH:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means, self._per = [(a + b) / 2 for a, b in pairs], 2 * self._per

    def line(self) -> str:
        """One block per mean, the highest value a full one."""
        low, high = min(self._means, default=0.0), max(self._means, default=0.0)
        scale = (len(self.BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(self.BLOCKS[round((value - low) * scale)] for value in self._means)
