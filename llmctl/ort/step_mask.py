"""The attention mask of decode steps, in a place and of a shape that stay from step to step.

A step writes one number of it per row. Binding a mask that is one longer at every step took a third of what a step
spends in Python. GroupQueryAttention reads the length of a row from the sum of its mask, so zeros may stand behind it.
"""

from __future__ import annotations

import numpy as np

STRIDE = 256
"""Widths are multiples of this, or the capacity: the graph sums the whole mask, so it should not be much too wide."""


class StepMask:
    """Masks of up to `rows` rows of up to `capacity` tokens, int64."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self._values = np.zeros(rows * capacity, np.int64)
        self.address = self._values.ctypes.data
        """Where the mask of the latest `write` lies."""
        self._numbers = self._values.data
        self._before: list[int] = []
        self._width = 0
        self._range = np.arange(capacity)

    def write(self, lengths: np.ndarray) -> tuple[int, int]:
        """Ones for the first `lengths[i]` tokens of row i, `lengths (B,)` from 1 on; the shape of the mask."""
        now = lengths.tolist()
        if not self._grown(now):
            self._fill(lengths, max(now))
        self._before = now
        return len(now), self._width

    def _grown(self, now: list[int]) -> bool:
        """Add a one to each row, if that is all that has changed; else some rows may be wrong."""
        if len(now) != len(self._before) or max(now) > self._width:
            return False
        numbers, start = self._numbers, -1
        for length, before in zip(now, self._before, strict=True):
            if length != before + 1:
                return False
            numbers[start + length] = 1
            start += self._width
        return True

    def _fill(self, lengths: np.ndarray, longest: int) -> None:
        self._width = min(self.capacity, -(-longest // STRIDE) * STRIDE)
        rows = self._values[: len(lengths) * self._width].reshape(len(lengths), self._width)
        np.less(self._range[: self._width], lengths[:, None], out=rows, casting="unsafe")
