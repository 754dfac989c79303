"""Duplicates: documents with equal text."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from llmctl.text.cleaning.params import ExactDuplicatesParams
from llmctl.text.cleaning.step import Drop, Finding, Outcome, Resolution, Signature, Signatures
from llmctl.text.documents import Document


class ExactDuplicates:
    """Keeps the first of every set of documents with equal text."""

    name = "exact-duplicates"

    def __init__(self, params: ExactDuplicatesParams, seed: int) -> None:
        self._normalise = params.normalise

    def signatures(self, document: Document) -> Iterable[Signature]:
        """Half of a 128-bit digest as the key, the other half as the payload: equal means equal text."""
        text = document.text
        if self._normalise:
            text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        yield int.from_bytes(digest[:8], "big"), digest[8:]

    def match(self, signatures: Signatures) -> Iterable[Finding]:
        """(first, further) for every further document of a set."""
        for _, refs, payloads in signatures.groups():
            if len(refs) > 1:
                first: dict[bytes, int] = {}
                for ref, payload in zip(refs, payloads, strict=True):
                    if first.setdefault(payload, ref) != ref:
                        yield first[payload], ref

    def resolve(self, findings: Iterator[Finding]) -> Resolution:
        """Every further document goes."""
        verdicts = [(further, first) for first, further in findings]
        sets = len({first for _, first in verdicts})
        return Resolution(verdicts, facts={"sets": sets, "duplicates": len(verdicts)})

    def filter(self, document: Document, verdict: Any, shared: Any) -> Outcome:
        """Drop what has a verdict."""
        return document if verdict is None else Drop("exact duplicate")
