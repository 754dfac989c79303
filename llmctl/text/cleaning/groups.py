"""Groups of documents: which one a document is in, how uneven they are, and how large each is, by rank.

A document's *rank* is a hash of its source and id. Those of a group whose rank is below a threshold are a random part
of it, the same whatever the shards. Sizes are counted in 65,536 bins of ranks, so that a threshold can be found for
any share, in memory that does not grow with the corpus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmctl.text.cleaning.samples import rank
from llmctl.text.cleaning.step import Finding, Signature, Signatures
from llmctl.text.documents import Document

UNKNOWN = "unknown"
BIN_SHIFT = 48


def group_of(document: Document, by: str) -> str:
    """The document's group; `unknown` where nothing is known."""
    meta = document.meta
    if by == "source":
        return str(meta.get("corpus") or document.source.split("/")[0] or UNKNOWN)
    if by == "class":
        return str(meta.get("label", UNKNOWN))
    if by == "language" and meta.get("code"):
        return f"code: {meta['code']}"
    value = meta.get(by)
    return UNKNOWN if value is None or value == "" else str(value)


def group_of_row(row: Mapping[str, Any], by: str) -> str:
    """The group that a dataset's row with `text` says it is in, as `group_of`; else the value of its own column."""
    meta = row["meta"] if isinstance(row.get("meta"), Mapping) else {}
    document = Document(str(row.get("id", "")), str(row.get("source") or ""), row["text"], meta=meta)
    found = group_of(document, by)
    own = row.get(by)
    return str(own) if found == UNKNOWN and own is not None and own != "" else found


def document_rank(document: Document, seed: int, step: str) -> int:
    """64 bits that depend on the document's source and id, the seed and the step."""
    return rank(seed, step, document.source, document.id)


def sign(document: Document, by: str, seed: int, step: str) -> Signature:
    """Rank, and as the payload size in bytes and group."""
    size = len(document.text.encode("utf-8", "surrogatepass"))
    return document_rank(document, seed, step), f"{size} {group_of(document, by)}".encode("utf-8", "surrogatepass")


def count_bins(signatures: Signatures) -> Iterator[Finding]:
    """(group, bin, documents, bytes) of a range of ranks."""
    held: dict[tuple[str, int], list[int]] = {}
    for key, payload in zip(signatures.keys.tolist(), signatures.payloads, strict=True):
        size, _, group = payload.decode("utf-8", "surrogatepass").partition(" ")
        pair = held.setdefault((group, key >> BIN_SHIFT), [0, 0])
        pair[0] += 1
        pair[1] += int(size)
    for (group, place), (documents, size_of_bin) in sorted(held.items()):
        yield group, place, documents, size_of_bin


@dataclass
class Sizes:
    """Documents and bytes of one group, in all and by bins of ranks."""

    documents: int = 0
    bytes: int = 0
    bins: list[tuple[int, int, int]] = field(default_factory=list)
    """(bin, documents, bytes), in order."""

    def size(self, unit: str) -> int:
        """Documents or bytes."""
        return self.bytes if unit == "bytes" else self.documents

    def cut(self, share: float, unit: str) -> tuple[int, int, int]:
        """(rank below which lies about `share` of the group, documents below it, bytes below it).

        The nearest to `share` that a whole bin allows; with up to some thousand documents a bin holds one.
        """
        wanted = share * self.size(unit)
        best, best_miss = (0, 0, 0), wanted
        documents = size = 0
        for place, more_documents, more_bytes in self.bins:
            documents, size = documents + more_documents, size + more_bytes
            miss = abs((size if unit == "bytes" else documents) - wanted)
            if miss > best_miss:
                break
            best, best_miss = ((place + 1) << BIN_SHIFT, documents, size), miss
        return best


def sizes_of(findings: Iterable[Finding]) -> dict[str, Sizes]:
    """Group → sizes, the groups by name."""
    bins: dict[str, dict[int, list[int]]] = {}
    for group, place, documents, size in findings:
        pair = bins.setdefault(group, {}).setdefault(place, [0, 0])
        pair[0] += documents
        pair[1] += size
    found = {}
    for group in sorted(bins):
        listed = [(place, pair[0], pair[1]) for place, pair in sorted(bins[group].items())]
        found[group] = Sizes(sum(item[1] for item in listed), sum(item[2] for item in listed), listed)
    return found


def spread(counts: Sequence[float]) -> dict[str, Any]:
    """How uneven groups are: their number, entropy in bits, effective number 2^entropy (Hill's number of order 1),
    largest share, and how many times the smallest group the largest is."""
    present = [count for count in counts if count > 0]
    total = sum(present)
    if not total:
        return {"groups": 0, "entropy": 0.0, "effective": 0.0, "largest": 0.0, "ratio": 0.0}
    entropy = -sum(count / total * math.log2(count / total) for count in present)
    return {
        "groups": len(present),
        "entropy": round(max(0.0, entropy), 4),
        "effective": round(2 ** max(0.0, entropy), 4),
        "largest": round(max(present) / total, 6),
        "ratio": round(max(present) / min(present), 3),
    }
