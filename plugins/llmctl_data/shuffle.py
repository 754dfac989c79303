"""The file-based shuffle of corpus steps: signatures by task → ranges of keys → findings → verdicts by task."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.text.cleaning.step import TASK_SHIFT, Finding, Resolution, Signatures

if TYPE_CHECKING:
    import numpy as np

MATCH_BYTES = 64 << 20
"""Bytes of signatures that are matched at once, as far as whole buckets allow."""
BUCKETS = 256
"""Keys are dealt into so many buckets, by their first byte; a range is some of them in a row."""
KEYS, NUMBERS, LENGTHS, PAYLOADS, INDEX = "keys.bin", "numbers.bin", "lengths.bin", "payloads.bin", "index.json"
FINDINGS, SHARED, FACTS = "findings.jsonl", "shared.json", "facts.json"


class SignatureWriter:
    """The signatures of one task; kept in memory until all are there: 20 bytes each and their payloads."""

    def __init__(self) -> None:
        self._keys, self._numbers, self._payloads = array("Q"), array("Q"), list[bytes]()

    def add(self, key: int, number: int, payload: bytes) -> None:
        """One signature of the document with this number."""
        self._keys.append(key)
        self._numbers.append(number)
        self._payloads.append(payload)

    def write(self, folder: Path) -> None:
        """Sorted by key and number, with the place of every bucket."""
        import numpy as np

        keys, numbers = np.array(self._keys, np.uint64), np.array(self._numbers, np.uint64)
        order = np.lexsort((numbers, keys))
        lengths = np.array([len(payload) for payload in self._payloads], np.uint32)[order]
        (folder / KEYS).write_bytes(keys[order].tobytes())
        (folder / NUMBERS).write_bytes(numbers[order].tobytes())
        (folder / LENGTHS).write_bytes(lengths.tobytes())
        with (folder / PAYLOADS).open("wb") as file:
            for place in order:
                file.write(self._payloads[place])
        buckets = keys[order] >> np.uint64(56)
        rows = np.searchsorted(buckets, np.arange(BUCKETS + 1, dtype=np.uint64))
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        (folder / INDEX).write_text(json.dumps({"rows": rows.tolist(), "bytes": ends[rows].tolist()}))


def _index(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return found


def ranges(folders: Sequence[Path]) -> list[tuple[int, int]]:
    """Buckets from … to, so that each range is about MATCH_BYTES."""
    sizes = [0] * BUCKETS
    for folder in folders:
        index = _index(folder)
        for bucket in range(BUCKETS):
            rows = index["rows"][bucket + 1] - index["rows"][bucket]
            sizes[bucket] += 20 * rows + index["bytes"][bucket + 1] - index["bytes"][bucket]
    found: list[tuple[int, int]] = []
    start = size = 0
    for bucket in range(BUCKETS):
        if size and size + sizes[bucket] > MATCH_BYTES:
            found.append((start, bucket))
            start, size = bucket, 0
        size += sizes[bucket]
    return [*found, (start, BUCKETS)]


def load_range(folders: Sequence[Path], start: int, end: int) -> Signatures:
    """The signatures of these buckets of all tasks, sorted by key and reference."""
    import numpy as np

    keys: list[np.ndarray] = []
    refs: list[np.ndarray] = []
    payloads: list[bytes] = []
    for task, folder in enumerate(folders):
        index = _index(folder)
        first, last = index["rows"][start], index["rows"][end]
        keys.append(_slice(folder / KEYS, np.uint64, first, last))
        refs.append(_slice(folder / NUMBERS, np.uint64, first, last) | np.uint64(task << TASK_SHIFT))
        lengths = _slice(folder / LENGTHS, np.uint32, first, last)
        with (folder / PAYLOADS).open("rb") as file:
            file.seek(index["bytes"][start])
            payloads += [file.read(int(length)) for length in lengths]
    all_keys, all_refs = np.concatenate(keys), np.concatenate(refs)
    order = np.lexsort((all_refs, all_keys))
    return Signatures(all_keys[order], all_refs[order], [payloads[place] for place in order])


def _slice(path: Path, kind: Any, first: int, last: int) -> np.ndarray:
    import numpy as np

    width = np.dtype(kind).itemsize
    return np.fromfile(path, kind, count=last - first, offset=first * width)


def read_findings(folders: Sequence[Path]) -> Iterator[Finding]:
    """The findings of all ranges, in order."""
    for folder in folders:
        with (folder / FINDINGS).open(encoding="utf-8") as lines:
            for line in lines:
                yield tuple(json.loads(line))


def write_resolution(resolution: Resolution, folder: Path) -> None:
    """A file of verdicts for every task that has any, what all tasks share, and the facts for the audit."""
    by_task: dict[int, list[tuple[int, Any]]] = {}
    for ref, verdict in resolution.verdicts:
        by_task.setdefault(ref >> TASK_SHIFT, []).append((ref & ((1 << TASK_SHIFT) - 1), verdict))
    for task, verdicts in by_task.items():
        with (folder / f"verdicts-{task:06d}.jsonl").open("w", encoding="utf-8") as file:
            for number, verdict in verdicts:
                file.write(json.dumps([number, verdict]) + "\n")
    (folder / SHARED).write_text(json.dumps(resolution.shared), encoding="utf-8")
    (folder / FACTS).write_text(json.dumps(dict(resolution.facts)), encoding="utf-8")


def read_verdicts(folder: Path, task: int) -> tuple[dict[int, Any], Any]:
    """(number of the document → verdict, what all tasks share) for one task."""
    path = folder / f"verdicts-{task:06d}.jsonl"
    verdicts: dict[int, Any] = {}
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                number, verdict = json.loads(line)
                verdicts[number] = verdict
    return verdicts, json.loads((folder / SHARED).read_text(encoding="utf-8"))
