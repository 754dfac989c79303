"""Keys and values of past sequences that no slot holds any more: a bounded pool in the host's memory."""

from __future__ import annotations

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
    """At most `capacity` tokens of past sequences; what was not asked for longest goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.evictions = 0
        self._kept: OrderedDict[int, Prefix] = OrderedDict()

    def match(self, tokens: np.ndarray, adapter: int = 0) -> tuple[Prefix | None, int]:
        """What of this adapter begins most like `tokens (T,)`, and for how many tokens."""
        best, longest = None, 0
        for key, prefix in self._kept.items():
            count = prefix.common(tokens, adapter)
            if count > longest:
                best, longest = key, count
        if best is None:
            return None, 0
        self._kept.move_to_end(best)
        return self._kept[best], longest

    def add(self, prefix: Prefix) -> None:
        """Keep a sequence, unless one that goes on from it is there; those that it goes on from are dropped."""
        count = len(prefix.tokens)
        shared = {key: other.common(prefix.tokens, prefix.adapter) for key, other in self._kept.items()}
        if count > self.capacity:
            self.evictions += 1
            return
        for key, length in shared.items():
            if length == len(self._kept[key].tokens):
                self._drop(key)
        self._kept[id(prefix)] = prefix
        self.used += count
        while self.used > self.capacity:
            self._drop(next(iter(self._kept)))
            self.evictions += 1

    def covers(self, tokens: np.ndarray, adapter: int = 0) -> bool:
        """Whether all of `tokens (T,)` are at the beginning of one sequence of this adapter."""
        return any(prefix.common(tokens, adapter) == len(tokens) for prefix in self._kept.values())

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self.used = 0

    def _drop(self, key: int) -> None:
        self.used -= len(self._kept.pop(key).tokens)


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the longest common prefix of two sequences of tokens."""
    width = min(len(one), len(other))
    differ = one[:width] != other[:width]
    return int(differ.argmax()) if differ.any() else width
