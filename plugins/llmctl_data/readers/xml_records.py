"""XML: a record for every element below the root.

An element that holds text alone is that text, to the last blank. One with attributes or elements is a mapping in their
order: `@name` for an attribute, the elements by their names, a list where a name comes again, `#text` for text beside
attributes. Values are strings, as XML has no other type, so numbers keep their digits. Text between elements is no
record, and neither is a file that declares entities.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from xml.parsers import expat

from llmctl.text.documents import Document
from llmctl_data.readers import streams
from llmctl_data.readers.piece import Note, Piece, Reject
from llmctl_data.readers.plain import cut_short
from llmctl_data.readers.records import to_document

BLOCK = 1 << 16
DEEPEST = 100
"""Elements within each other in a record."""
ROOT, RECORD = 1, 2
"""How many elements are open in the root, and in a record."""
HINT = "escape & and <; records are the elements below the root"


@dataclass
class _Element:
    """An open element: its name, what it holds so far, the pieces of its text."""

    name: str
    values: dict[str, Any]
    text: list[str] = field(default_factory=list)
    elements: bool = False

    def close(self) -> Any:
        """Its value. ValueError for text beside elements."""
        text = "".join(self.text)
        if self.elements and text.strip():
            raise ValueError(f"`{self.name}` holds text beside elements")
        if not self.values:
            return text
        return self.values if self.elements or not text else {**self.values, "#text": text}

    def add(self, name: str, value: Any) -> None:
        """A child; a further one of the same name makes a list."""
        self.elements = True
        if name not in self.values:
            self.values[name] = value
        elif isinstance(self.values[name], _Repeated):
            self.values[name].append(value)
        else:
            self.values[name] = _Repeated([self.values[name], value])


class _Repeated(list[Any]):
    """Values of elements of one name; XML has no other lists."""


class _EntityError(ValueError):
    """An entity that is not one of XML's own five."""


class _Reader:
    """Events of the parser to records and rejects, in `found`."""

    def __init__(self, piece: Piece, limit: int) -> None:
        self._piece, self._limit = piece, limit
        asked = str(piece.options.get("encoding", "auto"))
        self._parser = expat.ParserCreate(None if asked == "auto" else asked)
        self._parser.ordered_attributes = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._data
        self._parser.EntityDeclHandler = self._entity
        self._parser.SkippedEntityHandler = self._skipped
        self._open: list[_Element] = []
        self._depth = self._rows = self._begin = self._line = 0
        self._fault, self._loose = "", False
        self.found: list[Document | Reject | Note] = []

    def feed(self, data: bytes, last: bool) -> None:
        """Parse a block. ExpatError for what is no XML; LookupError and ValueError for other faults."""
        self._parser.Parse(data, last)
        if self._depth >= RECORD and self._parser.CurrentByteIndex - self._begin > self._limit:
            self._too_long()

    def _start(self, name: str, attributes: list[str]) -> None:
        self._depth += 1
        self._loose = False
        if self._depth == RECORD:
            self._begin, self._line = self._parser.CurrentByteIndex, self._parser.CurrentLineNumber
            self._fault = ""
        elif self._depth > RECORD + DEEPEST:
            self._fault = self._fault or f"elements lie more than {DEEPEST} deep"
        if self._depth >= RECORD and not self._fault:
            pairs = zip(attributes[::2], attributes[1::2], strict=True)
            self._open.append(_Element(name, {f"@{key}": value for key, value in pairs}))

    def _end(self, name: str) -> None:
        self._depth -= 1
        if self._depth < ROOT:
            return
        if not self._fault:
            self._close()
        if self._depth == ROOT and self._fault:
            self._open.clear()
            self._reject("broken record", self._fault)

    def _close(self) -> None:
        element = self._open.pop()
        try:
            value = element.close()
        except ValueError as error:
            self._fault = str(error)
            return
        if self._open:
            self._open[-1].add(element.name, value)
        elif self._parser.CurrentByteIndex - self._begin > self._limit:
            self._too_long()
        else:
            self._rows += 1
            row = value if isinstance(value, dict) else {element.name: value}
            made = to_document(self._piece, row, self._rows, line=False)
            if isinstance(made, Document):
                made = replace(made, meta={"element": element.name, **made.meta})
            self.found.append(made)

    def _data(self, text: str) -> None:
        if self._open and not self._fault:
            self._open[-1].text.append(text)
        elif self._depth == ROOT and text.strip() and not self._loose:
            self._loose = True
            self._line = self._parser.CurrentLineNumber
            self._reject("broken record", f"text between records: {text.strip()[:40]!r}")

    def _too_long(self) -> None:
        self._fault = self._fault or f"the record is too long: more than {self._limit:,} bytes"
        self._open.clear()

    def _entity(self, name: str, *_: Any) -> None:
        raise _EntityError(f"it declares the entity `{name}`")

    def _skipped(self, name: str, *_: Any) -> None:
        raise _EntityError(f"it uses the entity `{name}`, which it does not declare")

    def _reject(self, reason: str, detail: str) -> None:
        self.found.append(Reject(self._piece.name, reason, detail, line=self._line, hint=HINT))

    def broken(self, error: Exception) -> Reject:
        """The reject for the rest of a file."""
        if isinstance(error, expat.ExpatError):
            detail = f"no valid XML: {expat.ErrorString(error.code)}"
            return Reject(self._piece.name, "broken file", detail, error.lineno, error.offset + 1, hint=HINT)
        line = self._parser.CurrentLineNumber
        if isinstance(error, _EntityError):
            return Reject(self._piece.name, "broken file", str(error), line, hint="write what it stands for instead")
        return Reject(self._piece.name, "wrong encoding", str(error), line, hint="convert it to UTF-8")


def read_xml(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """A document for every element below the root, while the file is read; what follows a fault of XML is not read."""
    reader = _Reader(piece, limit)
    fault: Reject | None = None
    told = False
    while fault is None:
        try:
            block = streams.next_bytes(stream, BLOCK)
            reader.feed(block, not block)
        except (expat.ExpatError, LookupError, ValueError) as error:
            fault = reader.broken(error)
        except streams.Damaged as error:
            fault = cut_short(piece, error, 0)
        told = told or bool(reader.found)
        yield from reader.found
        reader.found.clear()
        if fault is None and not block:
            break
    if fault is not None:
        yield fault
    elif not told:
        yield Reject(piece.name, "no records", "no element lies below the root", hint="leave it out", fault=False)
