"""Zeros that cost nothing until they are written: a large cache is free for a short chat."""

from __future__ import annotations

import math
import mmap
import sys

import numpy as np
from numpy.typing import DTypeLike


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array in a mapping of its own: the kernel gives a page when it is first written, and all go back at the end.

    `np.zeros` does so only above `malloc`'s threshold; below it memory that was used before is cleared, and so taken.
    Raises MemoryError if the system has not as much.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size or sys.platform == "win32":
        return np.zeros(shape, dtype)
    try:
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no {size} bytes for zeros of shape {shape}") from error
    return np.frombuffer(mapping, dtype).reshape(shape)
