"""Disjoint sets of references (Tarjan 1975): who is, by any chain, a duplicate of whom."""

from __future__ import annotations

from collections.abc import Iterator


class Clusters:
    """Sets that grow by joining; the smallest reference stands for its set, in whatever order they are joined."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def first(self, ref: int) -> int:
        """The smallest reference of the set of `ref`."""
        parents = self._parents
        root = ref
        while (parent := parents.setdefault(root, root)) != root:
            root = parent
        while parents[ref] != root:
            parents[ref], ref = root, parents[ref]
        return root

    def join(self, one: int, other: int) -> None:
        """Make one set of the two."""
        low, high = sorted((self.first(one), self.first(other)))
        self._parents[high] = low

    def sets(self) -> Iterator[tuple[int, list[int]]]:
        """(smallest, all members) of every set, in order."""
        members: dict[int, list[int]] = {}
        for ref in sorted(self._parents):
            members.setdefault(self.first(ref), []).append(ref)
        yield from sorted(members.items())
