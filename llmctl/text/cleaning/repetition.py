"""How repetitive a text is, by the measures of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1)."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from llmctl.text.cleaning.words import Hashes, extend, ngrams

PARAGRAPHS = re.compile(r"\n{2,}")
LINES = re.compile(r"\n+")


def repeats(pieces: Iterable[str]) -> tuple[int, int]:
    """(how many pieces were seen before, their characters)."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        else:
            seen.add(piece)
    return count, characters


def repeated_blocks(text: str, lines: float, paragraphs: float, line_chars: float, paragraph_chars: float) -> str:
    """The rule that repeated lines or paragraphs break, "" if none. The four are the largest shares allowed."""
    stripped = text.strip()
    for what, pattern, most, most_chars in (
        ("paragraphs", PARAGRAPHS, paragraphs, paragraph_chars),
        ("lines", LINES, lines, line_chars),
    ):
        pieces = pattern.split(stripped if what == "paragraphs" else text)
        count, characters = repeats(pieces)
        if count / len(pieces) > most:
            return f"repeated_{what}"
        if characters / len(text) > most_chars:
            return f"repeated_{what}_chars"
    return ""


def repeated_ngrams(
    text: str,
    words: list[str],
    hashes: Hashes,
    top: Iterable[tuple[int, float]],
    repeated: Iterable[tuple[int, float]],
) -> str:
    """The rule that repeated runs of words break, "" if none; `hashes` are those of `words`."""
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    grams, size = hashes, 1
    for n, most in top:
        grams, size = _grown(grams, size, hashes, n)
        if len(grams) and _top_chars(grams, lengths, n) / len(text) > most:
            return f"top_{n}_gram"
    for n, most in repeated:
        grams, size = _grown(grams, size, hashes, n)
        duplicated = _seen_before(grams)
        if duplicated is None:
            break  # no n-gram comes twice, so no longer one does
        if _covered_chars(duplicated, lengths, n) / len(text) <= most:
            continue  # cheap, and mostly enough
        if _repeated_chars(grams, lengths, n) / len(text) > most:
            return f"repeated_{n}_grams"
    return ""


def _grown(grams: Hashes, size: int, hashes: Hashes, n: int) -> tuple[Hashes, int]:
    """Hashes of n-grams from those of (n - 1)-grams where these are at hand."""
    if n != size + 1 or len(grams) < 2:
        return ngrams(hashes, n), n
    longer = grams[:-1].copy()
    extend(longer, hashes[n - 1 :])
    return longer, n


def _top_chars(grams: Hashes, lengths: np.ndarray, n: int) -> int:
    """Characters of the most frequent n-gram, blanks between its words included, times its count."""
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    counts = np.diff(np.append(starts, len(ordered)))
    most = counts.max()
    first = int(order[starts[counts == most]].min())  # of equally frequent ones the one that comes first
    return int((lengths[first : first + n].sum() + n - 1) * most)


def _seen_before(grams: Hashes) -> np.ndarray | None:
    """Which places hold an n-gram that came earlier; None if there are none."""
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    again = ordered[1:] == ordered[:-1]
    if not again.any():
        return None
    marks = np.zeros(len(grams), dtype=bool)
    marks[order[1:][again]] = True
    return marks


def _repeated_chars(grams: Hashes, lengths: np.ndarray, n: int) -> int:
    """Characters of n-grams seen before, counted from left to right without overlap.

    An n-gram that lies within a counted one is not remembered, so its next occurrence alone is no repetition.
    """
    ends = np.concatenate(([0], np.cumsum(lengths))).tolist()
    values = grams.tolist()
    seen: set[int] = set()
    total = place = 0
    while place < len(values):
        if values[place] in seen:
            total += ends[place + n] - ends[place]
            place += n
        else:
            seen.add(values[place])
            place += 1
    return total


def _covered_chars(duplicated: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters of all words that lie in some n-gram seen before: no less than what is counted of them."""
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    places = np.flatnonzero(duplicated)
    np.add.at(edges, places, 1)
    np.add.at(edges, places + n, -1)
    return int(lengths[np.cumsum(edges)[:-1] > 0].sum())
