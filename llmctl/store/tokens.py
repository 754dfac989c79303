"""The contents of token shards: every id is in the vocabulary, documents follow one another."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

from llmctl.store.types import Unfit, read_json

BLOCK = 1 << 20


def check_ids(directory: Path) -> None:
    """Raise Unfit at the first id outside the vocabulary and at offsets that fall. About 25 ms per million tokens."""
    meta = read_json(directory / "meta.json")
    if meta.get("url"):  # what lies elsewhere is taken on trust
        return
    code = "H" if meta["dtype"] == "uint16" else "I"
    for split in meta["splits"]:
        name = f"{split}-00000.bin"
        largest = max((max(block) for block in _blocks(directory / name, code)), default=-1)
        if largest >= meta["vocab_size"]:
            raise Unfit(f"{name} holds the id {largest}, the vocabulary has {meta['vocab_size']}")
        last = 0
        for block in _blocks(directory / f"{split}-00000.idx", "Q"):
            if block[0] < last or any(a > b for a, b in zip(block, block[1:], strict=False)):
                raise Unfit(f"{split}-00000.idx: offsets fall")
            last = block[-1]
        if last != meta["splits"][split]["tokens"]:
            raise Unfit(f"{split}-00000.idx ends at {last}, meta.json says {meta['splits'][split]['tokens']}")


def _blocks(path: Path, code: str) -> Iterator[array[int]]:
    """The little-endian values of a file, in blocks."""
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            block = array(code, data)
            if sys.byteorder == "big":
                block.byteswap()
            yield block
