"""What happened to the documents: counts, lengths, rejects and samples of a task, which add up over tasks.

Everything here merges to the same, whoever did the tasks: sums, minima and maxima, and reservoirs by rank.
Counts are Python's integers, of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from llmctl.text.cleaning.groups import UNKNOWN, spread
from llmctl.text.cleaning.samples import Reservoir, rank, shown
from llmctl.text.cleaning.step import Drop, Noted, Outcome, Several
from llmctl.text.documents import Document
from llmctl_data.readers.piece import Note, Reject

UNEVEN = ("source", "language", "class")
"""Groups whose imbalance the audit tells; classes are those of labelled rows."""


def size_of(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class StepLedger:
    """What one step did."""

    def __init__(self, name: str, place: int, seed: int, masks: bool = False) -> None:
        self.name, self._place, self._seed, self._masks = name, place, seed, masks
        self.documents_in = self.documents_out = self.edited = self.tagged = self.bytes_in = self.bytes_out = 0
        self.dropped: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.samples: dict[str, Reservoir] = {}

    def count(self, before: Document, outcome: Outcome) -> Document | None:
        """Note what became of a document; the document that goes on, None for one that does not."""
        self.documents_in += 1
        size = size_of(before.text)
        self.bytes_in += size
        if isinstance(outcome, Drop):
            self.dropped[outcome.reason] += 1
            self.found.update(outcome.found)
            self._sample(f"dropped: {outcome.reason}", before, None, outcome.detail)
            return None
        after = outcome
        if isinstance(after, Noted):
            self.found.update(after.found)
            after = after.document
        self.documents_out += 1
        if after is before:
            self.bytes_out += size
        elif after.text != before.text:
            self.bytes_out += size_of(after.text)
            self.edited += 1
            self._sample("edited", before, after, "")
        else:
            self.bytes_out += size
            self.tagged += after.meta != before.meta
        return after

    def copies(self, before: Document, several: Several) -> None:
        """Note that a document was replaced by several."""
        self.documents_in += 1
        self.documents_out += len(several.documents)
        self.bytes_in += size_of(before.text)
        self.bytes_out += sum(size_of(document.text) for document in several.documents)
        self.found.update(several.found)
        derived = next((document for document in several.documents if document.text != before.text), None)
        if derived is not None:
            self._sample("derived", before, derived, derived.id)

    def _sample(self, kind: str, before: Document, after: Document | None, detail: str) -> None:
        kept = self.samples.setdefault(kind, Reservoir())
        key = rank(self._seed, "sample", self._place, kind, before.id)
        if kept.wants(key):
            change = _change(before.text, after)
            if self._masks:  # where personal data are looked for, the audit shows none, of whatever step
                from llmctl.text.cleaning.pii import masked

                change = {what: masked(text) for what, text in change.items()}
            kept.offer(key, before.id, {"id": before.id, "detail": detail, **change})

    def to_json(self) -> dict[str, Any]:
        """For `merge`."""
        return {
            "name": self.name,
            "documents_in": self.documents_in,
            "documents_out": self.documents_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "edited": self.edited,
            "tagged": self.tagged,
            "dropped": dict(self.dropped),
            "found": dict(self.found),
            "samples": {kind: kept.to_json() for kind, kept in self.samples.items()},
        }

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what another task's ledger of the same step has."""
        for name in ("documents_in", "documents_out", "bytes_in", "bytes_out", "edited", "tagged"):
            setattr(self, name, getattr(self, name) + other[name])
        self.dropped.update(other["dropped"])
        self.found.update(other["found"])
        for kind, items in other["samples"].items():
            self.samples.setdefault(kind, Reservoir()).merge(items)

    def audit(self) -> dict[str, Any]:
        """As the audit has it: in a fixed order, samples without their ranks."""
        told = self.to_json()
        kinds = sorted(self.samples)
        return {
            **told,
            "dropped": _sorted(self.dropped),
            "found": _sorted(self.found),
            "samples": {kind: self.samples[kind].samples() for kind in kinds},
        }


def _change(before: str, after: Document | None) -> dict[str, str]:
    """What a sample shows: the beginning of a text that went, or the place where two texts begin to differ."""
    if after is None:
        return {"text": shown(before)}
    shortest = min(len(before), len(after.text))
    low, high = 0, shortest
    while low < high:  # equal slices are compared at the speed of memory
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[low:middle] == after.text[low:middle] else (low, middle - 1)
    start = max(0, low - 40)
    return {"before": shown(before[start:]), "after": shown(after.text[start:])}


class DocumentLedger:
    """Documents by what is known of them, and how long they are."""

    GROUPS = ("source", "format", "language", "license", "split")
    """Those that every document has one of."""

    def __init__(self) -> None:
        self.documents = self.bytes = self.characters = 0
        self.shortest: int | None = None
        self.longest = 0
        self.lengths: Counter[int] = Counter()
        """By the number of bits of the length in characters: bin b holds 2^(b-1) to 2^b - 1."""
        self.groups: dict[str, dict[str, list[int]]] = {group: {} for group in self.GROUPS}
        """Group → value → [documents, bytes]; `class` only where documents have one."""

    def add(self, document: Document, size: int, **known: str) -> None:
        """Count one document of `size` bytes; `known` are its source, format and split."""
        length = len(document.text)
        self.documents += 1
        self.bytes += size
        self.characters += length
        self.shortest = length if self.shortest is None else min(self.shortest, length)
        self.longest = max(self.longest, length)
        self.lengths[length.bit_length()] += 1
        meta = document.meta
        code = meta.get("code")
        language = f"code: {code}" if code else str(meta.get("language") or UNKNOWN)
        values = {"language": language, "license": str(meta.get("license") or UNKNOWN), **known}
        if "label" in meta:
            values["class"] = str(meta["label"])
        for group, value in values.items():
            pair = self.groups.setdefault(group, {}).setdefault(value, [0, 0])
            pair[0] += 1
            pair[1] += size

    def to_json(self) -> dict[str, Any]:
        """For `merge`."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "characters": self.characters,
            "shortest": self.shortest,
            "longest": self.longest,
            "lengths": {str(bits): count for bits, count in self.lengths.items()},
            "groups": self.groups,
        }

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what another task counted."""
        self.documents += other["documents"]
        self.bytes += other["bytes"]
        self.characters += other["characters"]
        if other["shortest"] is not None:
            self.shortest = other["shortest"] if self.shortest is None else min(self.shortest, other["shortest"])
        self.longest = max(self.longest, other["longest"])
        self.lengths.update({int(bits): count for bits, count in other["lengths"].items()})
        for group, values in other["groups"].items():
            for value, (documents, size) in values.items():
                pair = self.groups.setdefault(group, {}).setdefault(value, [0, 0])
                pair[0] += documents
                pair[1] += size

    def audit(self) -> dict[str, Any]:
        """As the audit has it."""
        bins = [
            {"from": 0 if bits == 0 else 1 << (bits - 1), "to": (1 << bits) - 1, "documents": self.lengths.get(bits, 0)}
            for bits in range(min(self.lengths, default=0), max(self.lengths, default=-1) + 1)
        ]
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "characters": self.characters,
            "lengths": {"unit": "characters", "shortest": self.shortest or 0, "longest": self.longest, "bins": bins},
            "imbalance": {
                group: {
                    unit: spread([pair[place] for pair in self.groups[group].values()])
                    for place, unit in enumerate(("documents", "bytes"))
                }
                for group in UNEVEN
                if group in self.groups
            },
            **{
                f"by_{group}": {
                    value: {"documents": documents, "bytes": size}
                    for value, (documents, size) in sorted(values.items(), key=lambda item: (-item[1][0], item[0]))
                }
                for group, values in self.groups.items()
            },
        }


class ReadLedger:
    """What reading gave: documents by source, rejects by reason, notes by kind, digests of files."""

    def __init__(self) -> None:
        self.sources: dict[str, dict[str, int]] = {}
        self.rejected: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def piece(self, source: str, size: int, first_part: bool) -> None:
        """A piece of a file has been read."""
        counts = self._source(source)
        counts["files"] += first_part
        counts["bytes"] += size

    def document(self, source: str) -> None:
        """A document was read."""
        self._source(source)["documents"] += 1

    def taken(self, source: str, copies: int) -> None:
        """It was taken so many times, by its source's weight."""
        self._source(source)["taken"] += copies

    def reject(self, reject: Reject) -> None:
        """Something was not."""
        self.rejected[reject.reason] += 1

    def note(self, note: Note) -> None:
        """A person should know something."""
        self.notes[note.kind] += 1

    def _source(self, name: str) -> dict[str, int]:
        return self.sources.setdefault(name, {"files": 0, "bytes": 0, "documents": 0, "taken": 0})

    def to_json(self) -> dict[str, Any]:
        """For `merge`."""
        return {"sources": self.sources, "rejected": dict(self.rejected), "notes": dict(self.notes)}

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what another task counted."""
        self.rejected.update(other["rejected"])
        self.notes.update(other["notes"])
        for name, counts in other["sources"].items():
            mine = self._source(name)
            for key, value in counts.items():
                mine[key] += value

    def audit(self) -> dict[str, Any]:
        """As the audit has it; the sources follow elsewhere."""
        total: Counter[str] = Counter()
        for counts in self.sources.values():
            total.update(counts)
        return {
            "files": total["files"],
            "bytes": total["bytes"],
            "documents": total["documents"],
            "rejected": _sorted(self.rejected),
            "encodings": _sorted(self.notes),
        }


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first, equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def merged(kind: type[Any], parts: Iterable[Mapping[str, Any]]) -> Any:
    """A ledger of `kind` with all parts."""
    whole = kind()
    for part in parts:
        whole.merge(part)
    return whole
