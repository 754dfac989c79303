"""What a reader is given, a piece of a source, and what it says beside documents: rejects and notes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmctl import InputError

SPOOL = "spool"
"""The format of documents that the stage itself has made."""


@dataclass(frozen=True)
class Piece:
    """A file, or a part of a large one, with the options of its source. JSON values only: it is written into a plan."""

    name: str
    """As the user knows it, relative to what was given."""
    path: str
    """Where it is: a path of this machine, or a URL for fsspec."""
    format: str
    source: str
    """Name of the source that it belongs to."""
    size: int = 0
    start: int = 0
    """First byte (text, JSONL) or first row group (Parquet)."""
    end: int | None = None
    """One past the last of those; None for all."""
    first: int = 1
    """Number of the first line or row."""
    part: int = 0
    """Which part of its file this is."""
    whole: bool = False
    """Whether all of the file goes to one split."""
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The reverse of `Piece(**…)`."""
        return asdict(self)


@dataclass(frozen=True)
class Reject:
    """A file, a line, a row or a page that gave no document, and why.

    `reason` is a short constant that is counted, `detail` the sentence for a person. A `fault` is something wrong with
    the source; empty files and documents are none.
    """

    name: str
    reason: str
    detail: str
    line: int | None = None
    column: int | None = None
    row: int | None = None
    page: int | None = None
    hint: str = ""
    fault: bool = True

    @property
    def where(self) -> str:
        """The name with its position: `a.jsonl:3:17`, `b.pdf page 4`."""
        place = "".join(f":{number}" for number in (self.line, self.column) if number is not None)
        place += f" row {self.row}" if self.row is not None else ""
        return self.name + place + (f" page {self.page}" if self.page is not None else "")

    def to_json(self) -> dict[str, Any]:
        """A row of rejects.jsonl: what is not known is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != ""}

    def error(self, path: str) -> InputError:
        """The same as an error, with the path instead of the name."""
        line = "" if self.line is None else f":{self.line}"
        row = "" if self.row is None else f": row {self.row}"
        page = "" if self.page is None else f": page {self.page}"
        joint = " " if not (line or row or page) else ": "
        return InputError(f"{path}{line}{row}{page}{joint}{self.detail}", hint=self.hint or None)


@dataclass(frozen=True)
class Note:
    """Something that a person should know about a file that was read: its encoding was guessed."""

    name: str
    kind: str
    detail: str
