"""Words and their n-grams as 64-bit hashes, the same in every process: what rules, duplicates and overlaps count."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt

from llmctl.errors import MachineError

Hashes = npt.NDArray[np.uint64]
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
"""A run of letters and digits, apostrophes within it included, or a run of signs."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai to Chinese
NORMAL = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
APOSTROPHES = str.maketrans("", "", "'’")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: products mod 2^64 keep all bits
MOST_WORDS = 1 << 19


def words_of(text: str) -> list[str]:
    """Words and signs of a text, in order."""
    return WORD.findall(text)


def normal_words(text: str) -> list[str]:
    """Words without case and signs; single characters of scripts that are written without spaces."""
    lowered = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return NORMAL.findall(lowered.translate(APOSTROPHES))


class WordHashes(dict[str, int]):
    """Hashes of words, remembered; forgotten when there are too many, so that memory stays flat."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from xxhash import xxh3_64_intdigest
        except ImportError as error:
            raise MachineError("xxhash is not installed", hint="pip install 'llmctl[data]'") from error
        self._hash: Any = xxh3_64_intdigest

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        value: int = self._hash(word.encode("utf-8", "surrogatepass"))
        self[word] = value
        return value

    def of(self, words: list[str]) -> Hashes:
        """`[len(words)]` hashes."""
        return np.fromiter(map(self.__getitem__, words), dtype=np.uint64, count=len(words))


def ngrams(hashes: Hashes, n: int) -> Hashes:
    """`[max(0, len - n + 1)]` hashes of the runs of `n`."""
    size = len(hashes) - n + 1
    if size <= 0:
        return np.empty(0, dtype=np.uint64)
    found = hashes[:size].copy()
    for offset in range(1, n):
        extend(found, hashes[offset : offset + size])
    return found


def extend(shorter: Hashes, following: Hashes) -> None:
    """Make of the hashes of n-grams, in place, those of (n + 1)-grams."""
    shorter *= MULTIPLIER
    shorter ^= shorter >> np.uint64(29)
    shorter += following
