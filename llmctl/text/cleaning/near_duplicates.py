"""The step `near-duplicates`: MinHash signatures in bands (Broder 1997)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llmctl.errors import MachineError
from llmctl.text.cleaning.clusters import Clusters
from llmctl.text.cleaning.kinds import Routed, with_meta
from llmctl.text.cleaning.params import NearDuplicatesParams
from llmctl.text.cleaning.step import Drop, Finding, Outcome, Resolution, Signature, Signatures
from llmctl.text.cleaning.words import Hashes, WordHashes, ngrams, normal_words
from llmctl.text.documents import Document

CHANCE = 1 / 256
"""Where minima differ, their lowest bytes agree in this share (b-bit MinHash, 0910.3349)."""


class NearDuplicates(Routed):
    """Keeps the first, in order of the sources, of every cluster of near duplicates, or tags them all.

    Candidates agree in a whole band; they are duplicates if the Jaccard similarity estimated from their signatures is
    at least `threshold`. Duplicates of duplicates are of one cluster.
    """

    name = "near-duplicates"

    def __init__(self, params: NearDuplicatesParams, seed: int) -> None:
        super().__init__(params)
        self._params, self._seed = params, seed
        self._words = WordHashes()
        self._minhash = load_minhash()

    def signatures(self, document: Document) -> Iterable[Signature]:
        """A key for each band; the payload is one byte per hash function, which is enough to estimate similarity, and
        for tags the document's id behind them."""
        if not self.touches(document):
            return []
        shingles = self.shingles(document.text)
        if not len(shingles):
            return []
        row = self.minima(shingles)
        payload = row.astype(np.uint8).tobytes()
        if self._params.action == "tag":
            payload += document.id.encode("utf-8", "surrogatepass")
        return [(key, payload) for key in self._keys(row)]

    def shingles(self, text: str) -> Hashes:
        """Hashes of the word n-grams, or of all words where there are fewer."""
        words = self._words.of(normal_words(text))
        return ngrams(words, min(self._params.ngram, max(1, len(words))))

    def minima(self, shingles: Hashes) -> np.ndarray:
        """`[num_perm]` uint32: the smallest hash of the shingles under each hash function."""
        matrix = self._minhash(shingles, [0, len(shingles)], self._params.num_perm, self._seed)
        return np.asarray(matrix.to_rows()[0], dtype=np.uint32)

    def _keys(self, row: np.ndarray) -> list[int]:
        """One 64-bit key per band; the band's number is part of it."""
        bands = row.reshape(self._params.bands, -1).astype(np.uint64)
        keys = np.arange(1, len(bands) + 1, dtype=np.uint64)
        for column in bands.T:
            keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(32)
        found: list[int] = keys.tolist()
        return found

    def match(self, signatures: Signatures) -> Iterable[Finding]:
        """(earlier, later, id of the earlier for tags) of documents in one bucket that are similar enough.

        Each is compared with those that no earlier one of the bucket stands for, so buckets of thousands of copies cost
        no more than their size.
        """
        for _, refs, payloads in signatures.groups():
            if len(refs) < 2:
                continue
            size = self._params.num_perm
            minima = b"".join(payload[:size] for payload in payloads)
            rows = np.frombuffer(minima, dtype=np.uint8).reshape(len(refs), size)
            left = np.arange(len(refs))
            while len(left) > 1:
                first, rest = left[0], left[1:]
                alike = self.similarity(rows[first], rows[rest]) >= self._params.threshold
                name = payloads[first][size:].decode("utf-8", "surrogatepass")
                for other in rest[alike].tolist():
                    yield refs[first], refs[other], name
                left = rest[~alike]

    @staticmethod
    def similarity(row: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """`[len(rows)]` Jaccard similarities estimated from signatures of one byte per hash function."""
        agreeing = (rows == row).mean(axis=1)
        similarity: np.ndarray = (agreeing - CHANCE) / (1 - CHANCE)
        return similarity

    def resolve(self, findings: Iterator[Finding]) -> Resolution:
        """All but the first of each cluster; for tags, all of it with the id of the first."""
        clusters = Clusters()
        names: dict[int, str] = {}
        for one, other, name in findings:
            clusters.join(one, other)
            names[one] = name  # the first of a cluster is the first of some pair
        tags = self._params.action == "tag"
        verdicts = [
            (ref, names[first]) for first, members in clusters.sets() for ref in members if tags or ref != first
        ]
        sizes: dict[int, int] = {}
        for _, members in clusters.sets():
            sizes[len(members)] = sizes.get(len(members), 0) + 1
        facts = {
            "clusters": sum(sizes.values()),
            "duplicates": sum((size - 1) * count for size, count in sizes.items()),
            "cluster_sizes": [[size, count] for size, count in sorted(sizes.items())],
        }
        return Resolution(verdicts, facts=facts)

    def filter(self, document: Document, verdict: Any, shared: Any) -> Outcome:
        """Drop or tag what has a verdict."""
        if verdict is None:
            return document
        return Drop("near duplicate") if self._params.action == "drop" else with_meta(document, duplicate_of=verdict)


def load_minhash() -> Any:
    """rensa's signatures of many documents, from hashes of their shingles."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise MachineError("rensa is not installed", hint="pip install 'llmctl[data]'") from error
    return RMinHash.digest_matrix_from_flat_token_hashes
