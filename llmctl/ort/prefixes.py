"""Keys and values of past sequences that no slot holds any more: a bounded pool in the host's memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Prefix:
    """One past sequence."""

    tokens: np.ndarray
    """`(T,)` int32."""
    values: np.ndarray
    """Keys and values, `(tensors, KV, T, d)`."""
    adapter: int = 0
    """Which adapter computed them; nobody else can go on from them."""

    def common(self, tokens: np.ndarray, adapter: int) -> int:
        """How many of `tokens (T,)` this is the beginning of, for a sequence of that adapter."""
        return common(self.tokens, tokens) if adapter == self.adapter else 0


class PrefixPool:
    """At most `capacity` tokens of past sequences; what was not asked for longest goes first.

    None of them begins another one. In the order of their tokens the one that shares most with any sequence stands
    right before or behind the place where that would stand, so finding it compares few of them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.evictions = 0
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._order: list[bytes] = []
        """The keys, sorted."""

    def match(self, tokens: np.ndarray, adapter: int = 0) -> tuple[Prefix | None, int]:
        """What of this adapter begins most like `tokens (T,)`, and for how many tokens."""
        at = bisect_left(self._order, _key(tokens, adapter))
        best, longest = b"", 0
        for key in self._order[max(0, at - 1) : at + 1]:
            if (count := self._kept[key].common(tokens, adapter)) > longest:
                best, longest = key, count
        if not longest:
            return None, 0
        self._kept.move_to_end(best)
        return self._kept[best], longest

    def add(self, prefix: Prefix) -> None:
        """Keep a sequence, unless one that goes on from it is there; the one that it goes on from is dropped."""
        count = len(prefix.tokens)
        if count > self.capacity:
            self.evictions += 1
            return
        if self.covers(prefix.tokens, prefix.adapter):
            return
        key = _key(prefix.tokens, prefix.adapter)
        at = bisect_left(self._order, key)
        if at and key.startswith(self._order[at - 1]):
            self._drop(self._order[at - 1])
        insort(self._order, key)
        self._kept[key] = prefix
        self.used += count
        while self.used > self.capacity:
            self._drop(next(iter(self._kept)))
            self.evictions += 1

    def covers(self, tokens: np.ndarray, adapter: int = 0) -> bool:
        """Whether all of `tokens (T,)` are at the beginning of one sequence of this adapter."""
        key = _key(tokens, adapter)
        at = bisect_left(self._order, key)
        return at < len(self._order) and self._order[at].startswith(key)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._order.clear()
        self.used = 0

    def _drop(self, key: bytes) -> None:
        self.used -= len(self._kept.pop(key).tokens)
        del self._order[bisect_left(self._order, key)]


def _key(tokens: np.ndarray, adapter: int) -> bytes:
    """Sorts like the adapter and then the tokens, number by number."""
    return adapter.to_bytes(4, "big") + tokens.astype(">u4").tobytes()


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the longest common prefix of two sequences of tokens."""
    width = min(len(one), len(other))
    differ = one[:width] != other[:width]
    return int(differ.argmax()) if differ.any() else width
