"""Vectors with names, of words or texts: read, written, and searched for what is near.

A directory of type `embeddings` holds `vectors.safetensors`, the names and `embeddings.json`; of words also
`vectors.txt`, word2vec's text format, which is read alone too, with its first line or, as GloVe writes it, without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.errors import InputError
from llmctl.text.datasets import read_lines, read_records

INFO, MATRIX, VOCABULARY, IDS, TEXT = "embeddings.json", "vectors.safetensors", "vocab.txt", "ids.jsonl", "vectors.txt"
NOT_FINITE = "cosines with it mean nothing; leave it out, or train with a lower rate"
BLOCK = 256
"""Questions that are compared with all vectors at once."""
WORD = re.compile(r"\w+(?:['’]\w+)*")
"""Runs of letters, digits and underscores; an apostrophe inside belongs to the word."""


@dataclass(frozen=True)
class Vectors:
    """`matrix (N, D)` float32, a row for each of `names`."""

    names: Sequence[str]
    matrix: np.ndarray
    info: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    """Of texts: what `ids.jsonl` says of each."""

    @cached_property
    def index(self) -> dict[str, int]:
        """Row of each name, the first where one stands twice."""
        return {name: row for row, name in reversed(list(enumerate(self.names)))}

    @cached_property
    def unit(self) -> np.ndarray:
        """All vectors brought to length 1; one without length stays as it is."""
        norms = np.linalg.norm(self.matrix, axis=1, keepdims=True)
        return np.asarray(self.matrix / np.where(norms > 0, norms, 1), np.float32)

    def row(self, name: str) -> int:
        """InputError for a name that has no vector."""
        if name not in self.index:
            raise InputError(f"{name!r} has no vector", hint=f"{len(self.names)} names have one; case counts")
        return self.index[name]

    def neighbours(
        self, queries: np.ndarray, top: int, without: Sequence[Sequence[int]] = ()
    ) -> list[list[tuple[int, float]]]:
        """For each of `queries (Q, D)` the `top` nearest rows with their cosines, nearest first.

        `without`: rows for each query that are no answer. Equal cosines are in the order of the rows.
        """
        queries = np.asarray(queries, np.float32)
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        queries = queries / np.where(norms > 0, norms, 1)
        found = []
        for start in range(0, len(queries), BLOCK):
            cosines = queries[start : start + BLOCK] @ self.unit.T
            for number, row in enumerate(cosines, start):
                left_out = list(without[number]) if without else []
                row[left_out] = -np.inf
                found.append([(int(i), float(row[i])) for i in largest(row, min(top, len(row) - len(set(left_out))))])
        return found

    def save(self, directory: Path) -> None:
        """Write the directory: of texts if there are `rows`, else of words, which hold no white space."""
        from safetensors.numpy import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": np.ascontiguousarray(self.matrix, np.float32)}, directory / MATRIX)
        names = IDS if self.rows else VOCABULARY
        if self.rows:
            lines = [json.dumps(row, ensure_ascii=False) for row in self.rows]
        else:
            lines = list(self.names)
            write_text(directory / TEXT, self)
        (directory / names).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        facts = {**self.info, "names": names, "vectors": len(self.names), "dim": int(self.matrix.shape[1])}
        (directory / INFO).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def split_words(text: str, how: str, *, lowercase: bool) -> list[str]:
    """The words of a text as `embed` tells them apart: `unicode` finds `WORD`, `whitespace` what it separates."""
    text = text.lower() if lowercase else text
    return WORD.findall(text) if how == "unicode" else text.split()


def largest(values: np.ndarray, top: int) -> np.ndarray:
    """Places of the `top` largest of `values (N,)`, largest first, equals in their order."""
    if top <= 0:
        return np.zeros(0, np.int64)
    if top < len(values):
        edge = np.partition(values, len(values) - top)[len(values) - top]
        places = np.flatnonzero(values >= edge)
    else:
        places = np.arange(len(values))
    return np.asarray(places[np.argsort(-values[places], kind="stable")][:top])


def load(path: Path | str) -> Vectors:
    """Vectors of a directory or of a text file. InputError names what is missing or damaged."""
    path = Path(path)
    if path.is_file():
        return read_text(path)
    if not (path / INFO).is_file():
        raise InputError(f"{path} holds no vectors", hint="make them with `llmctl embed`, or give a word2vec text file")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        facts = json.loads((path / INFO).read_text(encoding="utf-8"))
        matrix = load_file(path / MATRIX)["vectors"]
        names = facts["names"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} holds no readable vectors: {error}", hint="make them with `llmctl embed`") from error
    rows = [row for _, row in read_records(path / IDS)] if names == IDS else []
    words = [str(row.get("id")) for row in rows] if rows else _vocabulary(path / VOCABULARY)
    if matrix.ndim != 2 or len(words) != len(matrix):
        raise InputError(f"{path} has {len(words)} names and {matrix.shape[0]} vectors", hint="make it again")
    if len(wrong := np.flatnonzero(~np.isfinite(matrix).all(axis=1))):
        raise InputError(f"{path}: the vector of {words[wrong[0]]!r} is not finite", hint=NOT_FINITE)
    return Vectors(words, matrix, facts, rows)


def _vocabulary(path: Path) -> list[str]:
    return [line.rstrip("\n") for _, line in read_lines(path)]


def write_text(path: Path, vectors: Vectors) -> None:
    """word2vec's text format: a line with both sizes, then a name and its numbers a line, exact in float32."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"{len(vectors.names)} {vectors.matrix.shape[1]}\n")
        for name, row in zip(vectors.names, vectors.matrix, strict=True):
            file.write(f"{name} {' '.join(map(str, row.astype(np.float32)))}\n")


def read_text(path: Path) -> Vectors:
    """Read word2vec's or GloVe's text format. InputError names the line that does not fit."""
    names: list[str] = []
    rows: list[np.ndarray] = []
    announced: tuple[int, int] | None = None
    for number, line in read_lines(path):
        parts = line.rstrip("\n").rstrip(" ").split(" ")
        if number == 1 and len(parts) == 2 and all(part.isdigit() for part in parts):
            announced = int(parts[0]), int(parts[1])
            continue
        size = announced[1] if announced else len(rows[0]) if rows else len(parts) - 1
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
                row = np.array(parts[-size:] if size else [], np.float32)
        except ValueError:
            row = np.zeros(0, np.float32)
        if len(row) != size or len(parts) != size + 1 or not size:
            raise InputError(
                f"{path}:{number}: no name with {size or 'some'} numbers", hint="give word2vec's text format"
            )
        if not np.isfinite(row).all():
            raise InputError(f"{path}:{number}: the vector of {parts[0]!r} is not finite", hint=NOT_FINITE)
        names.append(parts[0])
        rows.append(row)
    if not rows or (announced and announced[0] != len(rows)):
        said = f", its first line says {announced[0]}" if announced else ""
        raise InputError(f"{path} holds {len(rows)} vectors{said}", hint="the file is cut short, or no such file")
    return Vectors(names, np.stack(rows), {"method": "file"})
