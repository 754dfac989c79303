"""The pool of past sequences beside a plain search through all of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmctl.ort.prefixes import Prefix, PrefixPool

SEQUENCES = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 1))
VALUES = np.zeros((1, 1, 1, 1), np.float32)


def shared(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def kept(pool: PrefixPool) -> list[tuple[list[int], int]]:
    return [(prefix.tokens.tolist(), prefix.adapter) for prefix in pool._kept.values()]


@given(st.lists(SEQUENCES, max_size=30), SEQUENCES)
def test_the_longest_beginning_is_found_among_all(added, asked):
    pool = PrefixPool(20)
    for tokens, adapter in added:
        pool.add(Prefix(np.array(tokens, np.int32), VALUES, adapter))
        held = kept(pool)
        assert pool.used == sum(len(tokens) for tokens, _ in held) <= pool.capacity
        assert sorted(pool._order) == pool._order
        for one, its in held:  # nothing is kept twice
            assert sum(its == adapter and one == other[: len(one)] for other, adapter in held) == 1
    tokens, adapter = asked
    held, wanted = kept(pool), np.array(tokens, np.int64)
    assert pool.covers(wanted, adapter) == any(a == adapter and tokens == t[: len(tokens)] for t, a in held)
    best, length = pool.match(wanted, adapter)
    assert length == max((shared(t, tokens) for t, a in held if a == adapter), default=0)
    assert (best is None) == (length == 0)
    if best is not None:
        assert best.tokens[:length].tolist() == tokens[:length]
        assert kept(pool)[-1] == (best.tokens.tolist(), adapter)  # the last to go


def test_what_was_not_asked_for_longest_goes_first():
    pool = PrefixPool(6)
    for tokens in ([1, 2], [3, 4], [5, 6]):
        pool.add(Prefix(np.array(tokens, np.int32), VALUES))
    pool.match(np.array([1, 9]))
    pool.add(Prefix(np.array([7], np.int32), VALUES))
    assert [tokens for tokens, _ in kept(pool)] == [[5, 6], [1, 2], [7]]
    pool.add(Prefix(np.arange(7, dtype=np.int32), VALUES))  # more than there is room for
    assert (pool.evictions, pool.used) == (2, 5)
    pool.clear()
    assert (pool.used, pool.match(np.array([1]))) == (0, (None, 0))
