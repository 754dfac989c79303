"""Files of documents between and after tasks: rows that are read once again, and members of the dataset's files."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmctl.text.cleaning.samples import rank
from llmctl.text.datasets import packed
from llmctl.text.documents import Document

if TYPE_CHECKING:
    import numpy as np

DOCUMENTS = "documents.jsonl.gz"
FIRST = "first.json"
ORDER, UNITS = "order.bin", "units.bin"
ROWS = "rows-{}.gz"


def write_document(document: Document, known: Mapping[str, str]) -> str:
    """A line with everything that is known of a document."""
    fields = [
        document.id,
        document.source,
        document.text,
        document.unit,
        document.split,
        dict(document.meta),
        dict(known),
    ]
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_documents(path: Path) -> Iterator[tuple[Document, dict[str, str]]]:
    """The reverse of `write_document` for a file of such lines."""
    with gzip.open(path, "rb") as lines:
        for line in lines:
            *fields, known = _loads(line)
            yield Document(*fields), known


def _loads(line: bytes) -> list[Any]:
    try:
        import orjson

        found: list[Any] = orjson.loads(line)
    except (ModuleNotFoundError, ValueError):
        found = json.loads(line)
    return found


class DocumentFile:
    """Documents on their way to the next segment: written fast, read once."""

    def __init__(self, folder: Path) -> None:
        # Neither time nor name in its head: equal documents are equal bytes.
        self._raw = (folder / DOCUMENTS).open("wb")
        lines: Any = gzip.GzipFile("", "wb", compresslevel=1, fileobj=self._raw, mtime=0)
        self._file = io.TextIOWrapper(lines, encoding="utf-8", newline="\n")
        self.count = 0

    def add(self, document: Document, known: Mapping[str, str]) -> None:
        """Append one."""
        self._file.write(write_document(document, known))
        self.count += 1

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
        self._raw.close()


class RowFiles:
    """The rows of a task as members of the dataset's files, one per split. The very first row stays aside: which
    split it goes to is known when all others are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, tuple[BinaryIO, io.TextIOWrapper]] = {}
        self._order, self._units = bytearray(), array("Q")
        self.splits: dict[str, dict[str, int]] = {}
        self.columns: list[str] = []

    def set_aside(self, document: Document, split: str, known: Mapping[str, str]) -> None:
        """Keep the first document."""
        told = {"split": split, "fixed": bool(document.split), "row": document.row(), "known": dict(known)}
        self.write_first({**told, "unit": document.unit or document.source})

    def write_first(self, told: Mapping[str, Any]) -> None:
        """Write what `first_of` reads."""
        (self._folder / FIRST).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")

    def add(self, document: Document, split: str, size: int) -> None:
        """Append the row of a document to its split."""
        self.add_row(document.row(), unit_key(document.unit or document.source), split, size)

    def add_row(self, row: Mapping[str, Any], unit: int, split: str, size: int) -> None:
        """Append a row, of a text of `size` bytes and the unit of this key, to its split."""
        if split not in self._open:
            raw = (self._folder / ROWS.format(split)).open("wb")
            self._open[split] = raw, packed(raw)
            self.splits[split] = {"rows": 0, "bytes": 0, "written": 0}
        self.columns += [name for name in row if name not in self.columns]
        line = json.dumps(row, ensure_ascii=False) + "\n"
        self._open[split][1].write(line)
        counts = self.splits[split]
        counts["rows"] += 1
        counts["bytes"] += size
        counts["written"] += len(line)
        self._order.append(list(self.splits).index(split))
        self._units.append(unit)

    def close(self) -> None:
        """Finish the files."""
        for raw, lines in self._open.values():
            lines.close()
            raw.close()
        (self._folder / ORDER).write_bytes(bytes(self._order))
        (self._folder / UNITS).write_bytes(self._units.tobytes())


def unit_key(unit: str) -> int:
    """64 bits that tell the units of documents apart."""
    return rank("unit", unit)


def units_of(folder: Path) -> np.ndarray:
    """`[rows]` uint64: the keys of the units of a task's rows, in the order in which they were read."""
    import numpy as np

    return np.fromfile(folder / UNITS, np.uint64)


def first_of(folder: Path) -> dict[str, Any] | None:
    """The document that a task has set aside, None if it has no document at all."""
    path = folder / FIRST
    if not path.is_file():
        return None
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def rows_of(folder: Path, splits: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, split) of a task in the order in which they were read, without the one aside."""
    with contextlib.ExitStack() as stack:
        opened = {split: stack.enter_context(gzip.open(folder / ROWS.format(split), "rb")) for split in splits}
        for place in (folder / ORDER).read_bytes():
            yield json.loads(opened[splits[place]].readline()), splits[place]
