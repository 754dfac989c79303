"""Texts to word ids: which words there are, how often, and where each sentence ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import Artifact, InputError, UsageError
from llmctl.text.datasets import read_lines, read_rows, row_texts, splits
from llmctl.text.vectors import split_words
from llmctl_embed.params import EmbedParams


@dataclass(frozen=True)
class Corpus:
    """`ids (N,)` of the words that are kept, sentence after sentence; `sentences (N,)` says which one each is in."""

    words: tuple[str, ...]
    counts: np.ndarray
    """`(V,)` int64, falling; equals are in the order of their first appearance."""
    ids: np.ndarray
    sentences: np.ndarray


def read_texts(text: Artifact, params: EmbedParams) -> Iterator[tuple[str, str]]:
    """(id, text) of every row or line, up to `limit`.

    InputError names the row without text; UsageError for a split of files, which have none.
    """
    if params.split and text.type == "files":
        raise UsageError(f"split: {params.split} has no effect on {text.path}, whose files have no splits")
    for number, found in enumerate(_rows(text, params.split)):
        if params.limit is not None and number >= params.limit:
            return
        yield found


def _rows(text: Artifact, split: str) -> Iterator[tuple[str, str]]:
    if text.type == "files":
        yield from _lines(text.path)
        return
    for name in [split] if split else splits(text):
        for number, row in enumerate(read_rows(text, name)):
            said = row_texts(row)
            if not said:
                raise InputError(f"{text.path}: row {number} of split `{name}` has no text", hint="rows are {id, text}")
            yield _id(row, f"{name}/{number}"), "\n".join(said)


def _id(row: dict[str, Any], default: str) -> str:
    return str(row["id"]) if row.get("id") is not None else default


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line with something on it, named by its file and number."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        for number, line in read_lines(file):
            if line.strip():
                yield f"{file.name}:{number}", line.strip()


def sentences(texts: Iterable[str], params: EmbedParams) -> Iterator[list[str]]:
    """The words of each text, or of each of its lines."""
    for text in texts:
        for part in text.splitlines() if params.unit == "line" else (text,):
            yield split_words(part, params.split_words, lowercase=params.lowercase)


def build(found: Iterable[list[str]], min_count: int, max_vocab: int | None, where: Path) -> Corpus:
    """Count and number the words; those left out leave no gap, as in word2vec. InputError if fewer than 2 remain."""
    numbers: dict[str, int] = {}
    pieces: list[np.ndarray] = []
    counted: Counter[int] = Counter()
    for words in found:
        row = [numbers.setdefault(word, len(numbers)) for word in words]
        counted.update(row)
        pieces.append(np.array(row, np.int32))
    order = [number for number, count in counted.most_common(max_vocab) if count >= min_count]
    if len(order) < 2:
        raise InputError(
            f"{where} has {len(order)} words that occur {min_count} times or more",
            hint="give more text, or a smaller min_count",
        )
    spelled = list(numbers)
    renumbered = np.full(len(numbers), -1, np.int32)
    renumbered[order] = np.arange(len(order), dtype=np.int32)
    ids = renumbered[np.concatenate(pieces)]
    number_of = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
    counts = np.array([counted[number] for number in order], np.int64)
    return Corpus(tuple(spelled[number] for number in order), counts, ids[ids >= 0], number_of[ids >= 0])
