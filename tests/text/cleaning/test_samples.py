"""Reservoirs of samples: the same whoever offered what, in whatever order."""

from __future__ import annotations

import itertools
from typing import Any

from llmctl.text.cleaning.samples import Reservoir


def kept(items: Any, size: int = 2) -> list[list[Any]]:
    reservoir = Reservoir(size)
    for key, name, sample in items:
        if reservoir.wants(key):
            reservoir.offer(key, name, sample)
    return reservoir.to_json()


def test_documents_of_one_id_are_kept_in_any_order() -> None:
    """Rank and id of two documents may be equal: ids come from the corpus."""
    items = [(7, "1", {"text": text, "detail": "d"}) for text in ("b", "a", "c")] + [(9, "2", {"text": "far"})]
    wholes = [kept(order) for order in itertools.permutations(items)]
    assert len(wholes[0]) == 2 and all(name == "1" for _, name, _ in wholes[0])
    assert all(whole == wholes[0] for whole in wholes)
    assert kept(items[:1] * 3) == [[7, "1", {"text": "b", "detail": "d"}]] * 2, "equal in everything"


def test_parts_merge_to_the_whole() -> None:
    items = [(n * 7 % 5, str(n % 3), {"text": str(n)}) for n in range(30)]
    whole = kept(items, 5)
    merged = Reservoir(5)
    for part in (items[20:], items[:9], items[9:20]):
        merged.merge(kept(part, 5))
    assert merged.to_json() == whole
    assert merged.samples() == [sample for _, _, sample in whole]
