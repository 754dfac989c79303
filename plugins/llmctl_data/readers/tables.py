"""Tables in HTML: a record for every row below the header, its cells by the names of the columns.

As the standard has it (HTML, 4.9): end tags of rows and cells may be missing, a cell may span columns and rows and then
stands in each, though not beyond its `thead`, `tbody` or `tfoot`, a table may lie in a cell of another. The header is
`thead`, or the first rows of which all cells are `th`; in a header of several rows a column is called by all of them.
Cells are strings, with blanks as one, so that numbers keep their digits. A table without a header is left out: nothing
says what its columns are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import takewhile

from llmctl.text.documents import Document
from llmctl_data.readers.markup import decode_page
from llmctl_data.readers.piece import Note, Piece, Reject
from llmctl_data.readers.plain import whole_file
from llmctl_data.readers.records import named_twice, to_document

WIDEST = 1000
"""Columns that a cell may span, as the standard has it; the same bound holds for rows here."""
MOST_COLUMNS = 10_000
"""Columns of a row; further cells are not laid out, so that a small page cannot ask for much memory."""
TO_THE_END = 1 << 62
"""Rows of a cell with `rowspan="0"`: all that its row group still has."""
GROUPS = ("thead", "tbody", "tfoot")
UNSEEN = frozenset({"script", "style", "template"})
BREAKS = frozenset({"br", "p", "div", "li", "ul", "ol", "hr", "h1", "h2", "h3", "h4", "h5", "h6"})


@dataclass
class _Cell:
    head: bool
    columns: int
    rows: int
    text: list[str] = field(default_factory=list)

    def value(self) -> str:
        return " ".join("".join(self.text).split())


@dataclass
class _Row:
    line: int
    head: bool
    group: int
    cells: list[_Cell] = field(default_factory=list)


@dataclass(eq=False)
class _Table:
    line: int
    rows: list[_Row] = field(default_factory=list)
    part: str = ""
    """The row group that is open, "" if none is."""
    groups: int = 0
    cell: _Cell | None = None
    caption: list[str] | None = None
    in_caption: bool = False

    def open_part(self, tag: str) -> None:
        """Begin a row group."""
        self.part = tag
        self.groups += 1

    def add_row(self, line: int) -> None:
        """Begin a row; outside of all row groups it begins a body, as the standard has it."""
        if not self.part:
            self.open_part("tbody")
        self.rows.append(_Row(line, self.part == "thead", self.groups))

    def grid(self) -> Iterator[tuple[_Row, list[str]]]:
        """Every row with the texts of its columns, cells that span several repeated; one row is held at a time."""
        hanging: dict[int, tuple[str, int]] = {}  # column → (text, rows that it takes from this one on)
        group = 0
        for row in self.rows:
            if row.group != group:
                group, hanging = row.group, {}
            laid: list[tuple[str, int]] = []
            for cell in row.cells:
                own = cell.value(), cell.rows
                for _ in range(cell.columns if len(laid) < MOST_COLUMNS else 0):
                    while len(laid) in hanging:
                        laid.append(hanging[len(laid)])
                    laid.append(own)
            while len(laid) in hanging:
                laid.append(hanging[len(laid)])
            hanging = {place: (text, rows - 1) for place, (text, rows) in enumerate(laid) if rows > 1}
            if laid:
                yield row, [text for text, _ in laid]

    def header(self) -> tuple[list[list[str]], int]:
        """The texts of the header's rows, and how many of them stand at the top of the body."""
        if head := [texts for row, texts in self.grid() if row.head]:
            return head, 0
        top = takewhile(lambda one: all(cell.head for cell in one[0].cells), self.grid())
        head = [texts for _, texts in top]
        return head, len(head)


class _Page(HTMLParser):
    """The tables of a page, in the order in which they end; those that do not are in `open`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[_Table] = []
        self.tables: list[_Table] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open what the tag opens; a row or cell ends the one before it."""
        self._unseen += tag in UNSEEN
        if self._unseen:
            return
        if tag == "table":
            self.open.append(_Table(self.getpos()[0]))
        if not self.open:
            return
        table = self.open[-1]
        if tag in (*GROUPS, "tr", "td", "th"):
            table.cell, table.in_caption = None, False
        if tag in GROUPS:
            table.open_part(tag)
        elif tag == "tr":
            table.add_row(self.getpos()[0])
        elif tag in ("td", "th"):
            if not table.rows:
                table.add_row(self.getpos()[0])
            given = dict(attrs)
            rows = _span(given.get("rowspan"))
            table.cell = _Cell(tag == "th", _span(given.get("colspan")) or 1, TO_THE_END if rows == 0 else rows)
            table.rows[-1].cells.append(table.cell)
        elif tag == "caption":
            table.caption, table.in_caption = [], True
        elif tag in BREAKS:
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        """Close what the tag closes."""
        if self._unseen:
            self._unseen -= tag in UNSEEN
            return
        if not self.open:
            return
        table = self.open[-1]
        if tag == "table":
            self.tables.append(self.open.pop())
        elif tag in ("td", "th", "tr", *GROUPS):
            table.cell = None
            table.part = "" if tag == table.part else table.part
        elif tag == "caption":
            table.in_caption = False
        elif tag in BREAKS:
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        """Text of the cell, or caption, that is open."""
        if not self.open or self._unseen:
            return
        table = self.open[-1]
        if table.cell is not None:
            table.cell.text.append(data)
        elif table.in_caption and table.caption is not None:
            table.caption.append(data)

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """`<![…` is a comment up to the next `>`, as in browsers; Python's parser asserts that it is one it knows."""
        return self.parse_bogus_comment(i, report=False)


def _span(given: str | None) -> int:
    """A span as it is given, at most `WIDEST`; 1 if it is no number."""
    digits = (given or "").strip()
    # Python refuses to read thousands of digits; the first few are more than `WIDEST` already.
    return min(int(digits.lstrip("0")[:8] or 0), WIDEST) if digits.isdecimal() else 1


def read_tables(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """A document for every row of every table of a page of up to `limit` bytes."""
    data = whole_file(piece, stream, limit)
    if isinstance(data, Reject):
        yield data
        return
    text, encoding = decode_page(data, str(piece.options.get("encoding", "auto")))
    if encoding != "utf-8":
        yield Note(piece.name, encoding, f"read as {encoding}")
    page = _Page()
    page.feed(text)
    page.close()
    tables = sorted([*page.tables, *page.open], key=lambda table: table.line)
    row = 0
    for number, table in enumerate(tables, start=1):
        for item in _records(piece, table, number):
            if isinstance(item, Reject):
                yield item
                continue
            row += 1
            names, line = item
            made = to_document(piece, names, row, line=False)
            yield _told(made, table, number) if isinstance(made, Document) else replace(made, row=None, line=line)
        if table in page.open:
            detail = "the table has no end: the page is cut short"
            yield Reject(piece.name, "cut short or damaged", detail, line=table.line, hint="fetch the page again")
    if not tables:
        yield Reject(piece.name, "page without table", "the page has no table", hint="leave it out", fault=False)


def _told(document: Document, table: _Table, number: int) -> Document:
    caption = " ".join("".join(table.caption or ()).split())
    known = {"table": number, **({"caption": caption} if caption else {})}
    return replace(document, meta={**known, **document.meta})


def _records(piece: Piece, table: _Table, number: int) -> Iterator[tuple[dict[str, str], int] | Reject]:
    """(record, line of its row) for every row below the header; a row of another width is a reject."""
    head, top = table.header()
    if not head:
        detail = f"table {number} has no header row: nothing says what its columns are"
        yield Reject(piece.name, "table without header", detail, line=table.line, fault=False)
        return
    names = [" ".join(dict.fromkeys(filter(None, parts))) for parts in zip(*head, strict=False)]
    names = [name or f"column {place}" for place, name in enumerate(names, start=1)]
    if twice := named_twice(names):
        detail = f"table {number} calls two columns `{twice}`"
        yield Reject(piece.name, "broken table", detail, line=table.line, hint="give each a name of its own")
        return
    for place, (row, texts) in enumerate(table.grid()):
        if row.head or place < top:
            continue
        if len(texts) == len(names):
            yield dict(zip(names, texts, strict=True)), row.line
        else:
            detail = f"{len(texts)} cells, the header of table {number} names {len(names)}"
            yield Reject(piece.name, "broken row", detail, line=row.line)
