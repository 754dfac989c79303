"""Zeros of a cache: nothing is taken before it is written, and everything goes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmctl.ort.lazy_zeros import zeros

STATM = Path("/proc/self/statm")


@pytest.mark.skipif(not STATM.exists(), reason="Linux")
def test_pages_are_taken_when_they_are_written_and_given_back() -> None:
    def resident() -> int:
        return int(STATM.read_text().split()[1]) * 4096

    spent = np.ones(12 << 20, np.int8)  # what `malloc` would give again, cleared and so in memory
    del spent
    before = resident()
    array = zeros((3, 4, 1 << 20), np.float32)
    assert resident() < before + (4 << 20)
    assert array.dtype == np.float32
    assert not array[1].any()
    array[0] = 1
    assert resident() > before + (12 << 20)
    del array
    assert resident() < before + (4 << 20)


def test_nothing_and_too_much() -> None:
    assert zeros((0, 3), np.int8).shape == (0, 3)
    with pytest.raises(MemoryError):
        zeros((1 << 62,), np.int8)
    with pytest.raises(MemoryError):
        zeros((1 << 62, 1 << 10), np.float32)
