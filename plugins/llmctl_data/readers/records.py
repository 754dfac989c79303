"""Rows to documents: JSON Lines, JSON, CSV, TSV, Parquet, and what readers of plugins give."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from llmctl import LlmctlError, MachineError
from llmctl.stage import load_string
from llmctl.text.documents import Document
from llmctl_data.readers.formats import readers
from llmctl_data.readers.piece import Note, Piece, Reject
from llmctl_data.readers.plain import decoded, whole_file
from llmctl_data.records import number as exact_number
from llmctl_data.records import record_to_text, text_of

Row = Mapping[str, Any]
BATCH = 256
"""Rows of Parquet that are held at once."""
MISSING = object()


def read_jsonl(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """A document for every line; a line that is no JSON object is a reject with its position."""
    number = piece.first - 1
    for item in decoded(piece, stream, limit):
        number += 1
        if not isinstance(item, str):
            if isinstance(item, Reject) and item.line is not None:
                number = item.line
            yield item
        elif item.strip():
            yield _from_line(piece, item, number)


def _from_line(piece: Piece, text: str, number: int) -> Document | Reject:
    try:
        bare = text.rstrip("\r\n")  # a line end would count as a further line
        row = load_exact(bare) if keeps_all(piece) else load_json(bare)
    except (ValueError, RecursionError) as error:
        column = error.colno if isinstance(error, json.JSONDecodeError) else None
        detail = f"no valid JSON: {error}"
        return Reject(piece.name, "broken line", detail, number, column, hint="one JSON object per line")
    if not isinstance(row, dict):
        detail = f"a {type(row).__name__}, not an object"
        return Reject(piece.name, "broken line", detail, number, hint="one JSON object per line")
    return to_document(piece, row, number)


def load_json(text: str) -> Any:
    """orjson where it is installed and agrees; it refuses some of what Python takes (NaN), and tells no column."""
    try:
        import orjson

        return orjson.loads(text)
    except (ModuleNotFoundError, ValueError):
        return json.loads(text)


def load_exact(text: str) -> Any:
    """JSON for a record: a number whose digits a float would not print is a Decimal, an integer has any size."""
    return json.loads(text, parse_float=exact_number)


def read_json(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """One object, or a list of them, of up to `limit` bytes."""
    data = whole_file(piece, stream, limit)
    if isinstance(data, Reject):
        yield data
        return
    try:
        text = data.decode(json.detect_encoding(data)).removeprefix("\ufeff")
        found = load_exact(text) if keeps_all(piece) else json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        column = error.colno if isinstance(error, json.JSONDecodeError) else None
        hint = "JSON Lines are called .jsonl"
        yield Reject(piece.name, "broken file", f"no valid JSON: {error}", line, column, hint=hint)
        return
    for number, row in enumerate(found if isinstance(found, list) else [found], start=1):
        if isinstance(row, dict):
            yield to_document(piece, row, number, line=False)
        else:
            yield Reject(piece.name, "broken row", f"a {type(row).__name__}, not an object", row=number)


def read_table(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """A document for every row below the names of the columns; one with more or fewer cells is a reject."""
    rejects: list[Reject | Note] = []

    def text() -> Iterator[str]:
        for item in decoded(piece, stream, limit):
            if isinstance(item, str):
                yield item
            else:
                rejects.append(item)

    csv.field_size_limit(max(limit, 1 << 17))
    table = csv.reader(text(), delimiter="\t" if piece.format == "tsv" else ",", strict=True)
    head: list[str] | None = None
    while True:
        try:
            cells = next(table, None)
        except csv.Error as error:
            hint = "quote cells that hold quotes or line ends"
            yield Reject(piece.name, "broken row", str(error), line=table.line_num, hint=hint)
            continue
        yield from rejects
        rejects.clear()
        if cells is None:
            return
        if head is None:
            head = cells
            if keeps_all(piece) and (twice := named_twice(head)) is not None:
                detail = f"two columns are called `{twice}`"
                yield Reject(piece.name, "broken table", detail, line=1, hint="give each a name of its own")
                return
        elif cells and len(cells) != len(head):
            detail = f"{len(cells)} cells, the first line names {len(head)}"
            yield Reject(piece.name, "broken row", detail, line=table.line_num)
        elif cells:
            yield to_document(piece, dict(zip(head, cells, strict=True)), table.line_num)


def named_twice(names: Sequence[str]) -> str | None:
    """The first name that stands there more than once."""
    counts = Counter(names)
    return next((name for name in names if counts[name] > 1), None)


def read_parquet(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """A document for every row of the piece's row groups, a few at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MachineError(f"reading {piece.name} needs pyarrow", hint="pip install 'llmctl[data]'") from error
    number = piece.first - 1
    try:
        with parquet.ParquetFile(stream) as table:
            groups = list(range(piece.start, table.num_row_groups if piece.end is None else piece.end))
            columns = None if keeps_all(piece) else wanted(piece, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=BATCH, row_groups=groups, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield to_document(piece, row, number, line=False)
    except (pyarrow.ArrowException, OSError) as error:
        detail = f"no readable Parquet: {' '.join(str(error).split())}"
        yield Reject(piece.name, "cut short or damaged", detail, row=number + 1, hint="fetch the file again")


def keeps_all(piece: Piece) -> bool:
    """Whether whole rows become text, so that every column is needed."""
    return piece.options.get("rows") == "record"


def wanted(piece: Piece, names: list[str]) -> list[str] | None:
    """The columns that `fields` needs of those there are; None (all) if the text's is not among them."""
    fields: Mapping[str, str] = piece.options["fields"]
    needed = {path if path in names else path.partition(".")[0] for path in fields.values()}
    return sorted(needed & set(names)) if fields["text"].partition(".")[0] in names or fields["text"] in names else None


def read_by_plugin(piece: Piece, limit: int) -> Iterator[Document | Reject | Note]:
    """A document for every mapping that the plugin's reader yields."""
    reader = readers()[piece.format.removeprefix("reader:")]
    number = 0
    try:
        from pathlib import Path

        for number, row in enumerate(load_string(reader.read)(Path(piece.path)), start=1):
            yield to_document(piece, row, number, line=False)
    except ModuleNotFoundError as error:
        raise MachineError(
            f"the reader `{reader.name}` needs the module `{error.name}`", hint=reader.install
        ) from error
    except LlmctlError as error:
        yield Reject(piece.name, "broken file", error.message, row=number + 1, hint=error.hint or "")
    except Exception as error:  # code of a plugin: whatever it raises is a fault of this one file
        yield Reject(piece.name, "broken file", f"{type(error).__name__}: {error}", row=number + 1)


def to_document(piece: Piece, row: Row, number: int, line: bool = True) -> Document | Reject:
    """The document of a row by `fields`; a reject if it has no text there, or values within values without end."""
    place: dict[str, Any] = {"line": number} if line else {"row": number}
    try:
        return _to_document(piece, row, f"{piece.name}#{number}", place)
    except RecursionError:
        return Reject(piece.name, "nested too deeply", "its values lie too deep within each other", **place)


def _to_document(piece: Piece, row: Row, identity: str, place: Mapping[str, Any]) -> Document | Reject:
    fields: Mapping[str, str] = piece.options["fields"]
    limit = int(piece.options["max_document_bytes"])
    if keeps_all(piece):
        text: Any = record_to_text(row)
    else:
        text = at(row, fields["text"])
    if not isinstance(text, str):
        columns = ", ".join(sorted(map(str, row))) or "none"
        fault = "is missing" if text is MISSING else "holds no text"
        detail = f"column `{fields['text']}` {fault}"
        hint = f"columns here: {columns}; set `column`"
        return Reject(piece.name, "no text", detail, hint=hint, **place)
    if len(text) > limit:
        return Reject(
            piece.name, "document too long", f"{len(text):,} characters", hint="raise max_document_bytes", **place
        )
    source = piece.name
    meta: dict[str, Any] = {}
    # What JSON calls a number stays one in `meta`, whatever its digits, so that a column has one type.
    decimals: Callable[[Decimal], Any] = float if piece.format in ("json", "jsonl") else str
    for name, path in fields.items():
        value = None if name == "text" else at(row, path)
        if value is None or value is MISSING:
            continue
        if name == "id":
            identity = str(value)
        elif name == "source":
            source = str(value)
        else:
            meta[name] = json_value(value, decimals)
    if keeps_all(piece):
        meta = {"format": piece.format, **meta, "kind": "table"}  # rules for prose would break it
    return Document(identity, source, text, identity, meta=meta)


def json_value(value: Any, decimals: Callable[[Decimal], Any] = str) -> Any:
    """What JSON can say of a value: dates, at any depth, become their text, bytes theirs or their hex, a Decimal what
    `decimals` makes of it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): json_value(one, decimals) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(one, decimals) for one in value]
    if isinstance(value, Decimal):
        return decimals(value)
    return text_of(value) if isinstance(value, bytes) else str(value)


def at(row: Row, path: str) -> Any:
    """The value of a column, or of `a.b.0` within columns that hold objects and lists; MISSING if there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value
