from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator
from llmctl.ort.step_mask import STRIDE, StepMask

CAPACITY = 2 * STRIDE + 40


def read(mask: StepMask, shape: tuple[int, int]) -> np.ndarray:
    """What a binding of this shape at this address sees."""
    memory = (ctypes.c_int64 * (shape[0] * shape[1])).from_address(mask.address)
    return np.array(memory).reshape(shape)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, CAPACITY - 6), min_size=1, max_size=4), st.integers(0, 5)),
        min_size=1,
        max_size=6,
    )
)
def test_whatever_came_before_the_first_tokens_of_each_row_are_marked(calls: list[tuple[list[int], int]]) -> None:
    mask = StepMask(4, CAPACITY)
    for start, steps in calls:
        for step in range(steps + 1):
            lengths = np.array(start) + step
            shape = mask.write(lengths)
            found = read(mask, shape)
            assert found.sum(axis=1).tolist() == lengths.tolist()
            assert all(row[:length].all() for row, length in zip(found, lengths, strict=True))
            assert shape[0] == len(start) and lengths.max() <= shape[1] <= CAPACITY


def test_the_shape_stays_for_many_steps() -> None:
    mask = StepMask(1, CAPACITY)
    shapes = [mask.write(np.array([length])) for length in range(1, CAPACITY + 1)]
    assert sorted(set(shapes)) == [(1, STRIDE), (1, 2 * STRIDE), (1, CAPACITY)]


@pytest.mark.parametrize("rows", [1, 3])
def test_zeros_behind_a_row_change_nothing(generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The answers of a mask as wide as the longest row, which is what transformers would give."""
    prompts = np.random.default_rng(1).integers(3, 97, (rows, 11)).tolist()
    sampling = Sampling(max_new_tokens=50)
    wide = generator.generate(prompts, sampling)
    monkeypatch.setattr("llmctl.ort.step_mask.STRIDE", 1)
    monkeypatch.setattr(generator, "_idle", None)
    assert generator.generate(prompts, sampling) == wide


def test_a_mask_that_is_not_written_is_noticed(generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    prompt, sampling = [5, 6, 7, 8], Sampling(max_new_tokens=40)
    right = list(generator.stream(prompt, sampling))
    monkeypatch.setattr(generator, "_idle", None)
    monkeypatch.setattr(StepMask, "_grown", lambda mask, now: mask._width > 0)
    assert list(generator.stream(prompt, sampling)) != right
