"""Samples that do not depend on who took them: of all that was offered, the few whose rank by a hash is lowest.

Reservoirs of parts merge into exactly the reservoir of the whole, in any order.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping
from typing import Any

KEPT = 5
"""Samples of each kind that are kept."""
SHOWN = 400
"""Characters of a text that a sample shows."""


def rank(*parts: Any) -> int:
    """A 64-bit number that depends on nothing but `parts`: the key of every random order."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


class Reservoir:
    """Up to `size` samples, each a mapping of JSON values."""

    def __init__(self, size: int = KEPT) -> None:
        self._size = size
        self._heap: list[tuple[int, str, str]] = []
        """(-rank, name, sample in JSON), the highest rank first: a total order, so no order of offers can matter."""

    def wants(self, key: int) -> bool:
        """Whether a sample of this rank would be kept: making one may be dear."""
        return len(self._heap) < self._size or -key >= self._heap[0][0]

    def offer(self, key: int, name: str, sample: Mapping[str, Any]) -> None:
        """Keep `sample` if its rank is among the lowest; between equal ranks `name` (the document's id) decides, and
        between documents of one id the sample itself."""
        item = (-key, name, json.dumps(sample, ensure_ascii=False))
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, item)
        else:
            heapq.heappushpop(self._heap, item)

    def to_json(self) -> list[list[Any]]:
        """For `merge`, lowest rank first."""
        ordered = sorted(self._heap, key=lambda item: (-item[0], *item[1:]))
        return [[-key, name, json.loads(sample)] for key, name, sample in ordered]

    def merge(self, items: Iterable[list[Any]]) -> None:
        """Add the samples of another reservoir, as its `to_json` gives them."""
        for key, name, sample in items:
            if self.wants(key):
                self.offer(key, name, sample)

    def samples(self) -> list[dict[str, Any]]:
        """What was kept, lowest rank first."""
        return [sample for _, _, sample in self.to_json()]


def shown(text: str) -> str:
    """The beginning of a text, as a sample shows it."""
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
