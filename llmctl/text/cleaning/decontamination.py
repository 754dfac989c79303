"""The step `decontaminate`: documents that hold evaluation items, by hashed word n-grams (GPT-3, 2005.14165, C)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.errors import InputError, UsageError
from llmctl.text.cleaning.kinds import Routed, with_meta
from llmctl.text.cleaning.params import DecontaminateParams
from llmctl.text.cleaning.step import Drop, Finding, Outcome, Resolution, Signature, Signatures
from llmctl.text.cleaning.words import Hashes, WordHashes, ngrams, normal_words
from llmctl.text.datasets import read_lines, read_rows, splits
from llmctl.text.documents import Document

LISTED = 200
"""Items that the report lists with the documents that hold them; the counts are of all."""


class Decontaminate(Routed):
    """Finds which document holds which evaluation item."""

    name = "decontaminate"

    def __init__(self, params: DecontaminateParams, seed: int, evaluation: Sequence[Path] = ()) -> None:
        super().__init__(params)
        if not evaluation:
            raise UsageError("decontaminate has nothing to look for", hint="bind the input `evaluation`")
        self._params = params
        self._words = WordHashes()
        self._names: list[str] = []
        self._sizes: list[int] = []
        self.short = 0
        self._tables = self._index(item for path in evaluation for item in items(path, params.fields))

    def _index(self, found: Iterable[tuple[str, str]]) -> dict[int, tuple[Hashes, np.ndarray]]:
        """n → (n-grams of the items, sorted; the number of the item of each)."""
        grams: dict[int, list[Hashes]] = {}
        owners: dict[int, list[np.ndarray]] = {}
        for name, text in found:
            words = self._words.of(normal_words(text))
            n = min(self._params.ngram, len(words))
            if n < min(self._params.min_words, self._params.ngram):
                self.short += 1
                continue
            own = np.unique(ngrams(words, n))
            grams.setdefault(n, []).append(own)
            owners.setdefault(n, []).append(np.full(len(own), len(self._names), dtype=np.int64))
            self._names.append(name)
            self._sizes.append(len(own))
        if not self._names:
            raise InputError(
                f"no evaluation item has {self._params.min_words} words in {', '.join(self._params.fields)}",
                hint="set `fields` to the columns that hold text, or lower `min_words`",
            )
        tables = {}
        for n, parts in sorted(grams.items()):
            joined, numbers = np.concatenate(parts), np.concatenate(owners[n])
            order = np.argsort(joined, kind="stable")
            tables[n] = (joined[order], numbers[order])
        return tables

    @property
    def count(self) -> int:
        """Items that are looked for."""
        return len(self._names)

    def hits(self, text: str) -> list[str]:
        """Names of the items that the text holds."""
        words = self._words.of(normal_words(text))
        counts: dict[int, int] = {}
        for n, (table, owners) in self._tables.items():
            own = np.unique(ngrams(words, n))
            starts, ends = np.searchsorted(table, own, "left"), np.searchsorted(table, own, "right")
            for place in np.flatnonzero(ends > starts):
                for owner in owners[starts[place] : ends[place]].tolist():
                    counts[owner] = counts.get(owner, 0) + 1
        share = self._params.share
        return sorted(self._names[owner] for owner, count in counts.items() if count / self._sizes[owner] >= share)

    def signatures(self, document: Document) -> Iterable[Signature]:
        """One for each item that the document holds."""
        for name in self.hits(document.text) if self.touches(document) else ():
            digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
            yield int.from_bytes(digest, "big"), f"{name}\0{document.id}".encode("utf-8", "surrogatepass")

    def match(self, signatures: Signatures) -> Iterable[Finding]:
        """(item, reference, id of the document)."""
        for _, refs, payloads in signatures.groups():
            for ref, payload in zip(refs, payloads, strict=True):
                name, _, identity = payload.decode("utf-8", "surrogatepass").partition("\0")
                yield name, ref, identity

    def resolve(self, findings: Iterator[Finding]) -> Resolution:
        """The items of each document, and for the report the documents of each item."""
        documents: dict[int, list[str]] = {}
        held: dict[str, list[str]] = {}
        for name, ref, identity in findings:
            documents.setdefault(ref, []).append(name)
            held.setdefault(name, []).append(identity)
        facts = {
            "items": self.count,
            "items_too_short": self.short,
            "items_found": len(held),
            "documents": len(documents),
            "found": [[name, sorted(ids)[:20]] for name, ids in sorted(held.items())[:LISTED]],
        }
        return Resolution([(ref, sorted(names)) for ref, names in sorted(documents.items())], facts=facts)

    def filter(self, document: Document, verdict: Any, shared: Any) -> Outcome:
        """Drop or tag what holds an item."""
        if verdict is None:
            return document
        if self._params.action == "tag":
            return with_meta(document, contaminated=list(verdict))
        return Drop("holds an evaluation item", ", ".join(verdict[:5]))


def items(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of all items of a dataset, a file of rows, or a text file (an item per paragraph)."""
    if path.suffix in (".txt", ".md"):
        paragraphs = "".join(line for _, line in read_lines(path)).split("\n\n")
        yield from ((f"{path.name}#{number}", text) for number, text in enumerate(paragraphs, start=1) if text.strip())
        return
    for split in splits(path):
        for number, row in enumerate(read_rows(path, split), start=1):
            for field in fields:
                for part, text in enumerate(_texts(row.get(field))):
                    yield f"{path.name}/{split}#{number}.{field}" + (f".{part}" if part else ""), text


def _texts(value: Any) -> Iterator[str]:
    """Texts of a column: itself, or those in a list (of messages, answers)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts(value.get("content", value.get("text")))
