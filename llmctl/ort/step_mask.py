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
        self._rows = self._values[:0].reshape(0, 0)
        self._before = np.zeros(0, np.int64)
        self._range = np.arange(max(rows, capacity))

    def write(self, lengths: np.ndarray) -> tuple[int, int]:
        """Ones for the first `lengths[i]` tokens of row i, `lengths (B,)` from 1 on; the shape of the mask."""
        count = len(lengths)
        grown = count == len(self._before) and self._grown(lengths)
        if not grown:
            self._fill(lengths)
        return count, self._rows.shape[1]

    def _grown(self, lengths: np.ndarray) -> bool:
        """Add a one to each row, if that is all that has changed."""
        if len(lengths) == 1:
            length = int(lengths[0])
            if length != int(self._before[0]) + 1 or length > self._rows.shape[1]:
                return False
            self._rows[0, length - 1] = 1
            self._before[0] = length
            return True
        self._before += 1
        if not np.array_equal(self._before, lengths) or int(self._before.max()) > self._rows.shape[1]:
            return False
        self._rows[self._range[: len(lengths)], lengths - 1] = 1
        return True

    def _fill(self, lengths: np.ndarray) -> None:
        longest = int(lengths.max())
        width = min(self.capacity, -(-longest // STRIDE) * STRIDE)
        self._rows = self._values[: len(lengths) * width].reshape(len(lengths), width)
        np.less(self._range[:width], lengths[:, None], out=self._rows, casting="unsafe")
        self._before = lengths.copy()
