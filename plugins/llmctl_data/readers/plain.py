"""Text, Markdown and source code: lines to documents."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from llmctl.text.documents import Document
from llmctl_data.readers import streams
from llmctl_data.readers.formats import language_of
from llmctl_data.readers.piece import Note, Piece, Reject

LONGEST_FRONT_MATTER = 200
"""Lines; a rule at the top of a page with more below it begins no front matter."""


def read_text_file(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """Documents of about `piece_chars` characters of a text or Markdown file; a too long line is left out."""
    lines = decoded(piece, stream, limit)
    if piece.format == "markdown" and piece.part == 0:
        lines = without_front_matter(lines)
    # Ids as ever in the first part of a file; those of further parts say which part.
    prefix = f"{piece.name}#" if piece.part == 0 else f"{piece.name}#{piece.part}-"
    number = 0
    for text in pieces(lines, int(piece.options["piece_chars"])):
        if not isinstance(text, str):
            yield text
            continue
        identity = f"{prefix}{number}"
        yield Document(identity, piece.name, text, piece.name if piece.whole else identity)
        number += 1


def read_code(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """One document, every character as it is."""
    parts: list[str] = []
    size = 0
    for item in decoded(piece, stream, limit):
        if not isinstance(item, str):
            yield item
            if isinstance(item, Reject):
                return
            continue
        parts.append(item)
        size += len(item)
        if size > limit:
            yield too_long(piece, "the file", f"more than {limit:,} bytes")
            return
    meta = {"code": language_of(piece.name)}
    yield Document(piece.name, piece.name, "".join(parts), piece.name, meta=meta)


def decoded(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[str | Reject | Note]:
    """The lines of a piece as text, and a note at the end if the encoding had to be guessed."""
    asked = str(piece.options.get("encoding", "auto"))
    named = ""
    if piece.part == 0:
        stream, named = streams.as_text(stream, asked)
    decoder = streams.Decoder("auto" if named == "utf-8" else asked)
    size = None if piece.end is None else piece.end - piece.start - (3 if named == "utf-8" else 0)
    number = piece.first - 1
    try:
        for number, line, length in streams.bounded_lines(stream, limit, piece.first, size):
            if line is None:
                yield too_long(piece, "the line", f"{length:,} bytes", number)
                continue
            try:
                yield decoder(line, number)
            except UnicodeDecodeError as error:
                yield not_in(piece, error, number)
    except streams.Damaged as error:
        yield cut_short(piece, error, number)
    except UnicodeDecodeError as error:
        yield not_in(piece, error, number + 1)
    if named not in ("", "utf-8"):
        yield Note(piece.name, named, f"read as {named}, as its byte order mark says")
    elif decoder.guessed is not None:
        yield Note(piece.name, "cp1252", f"read as cp1252: line {decoder.guessed} is no UTF-8")


def too_long(piece: Piece, what: str, size: str, line: int | None = None) -> Reject:
    """The reject for something above `max_document_bytes`."""
    detail = f"{what} is too long: {size}"
    return Reject(piece.name, f"{what.split()[-1]} too long", detail, line=line, hint="raise max_document_bytes")


def not_in(piece: Piece, error: UnicodeDecodeError, number: int) -> Reject:
    """The reject for bytes that are not in the encoding that was asked for, or that a mark names."""
    encoding = "UTF-8" if error.encoding in ("utf-8", "utf8") else error.encoding
    byte = error.object[error.start] if error.start < len(error.object) else 0
    detail = f"byte {byte:#04x} at column {error.start + 1} is no {encoding}"
    return Reject(piece.name, "wrong encoding", detail, line=number, column=error.start + 1, hint="set `encoding`")


def cut_short(piece: Piece, error: Exception, number: int) -> Reject:
    """The reject for packed data that end too early."""
    from llmctl_data.readers.formats import packing_of

    detail = f"the {packing_of(piece.name) or piece.format} data is cut short or damaged ({error})"
    return Reject(piece.name, "cut short or damaged", detail, line=number + 1, hint="fetch the file again")


def whole_file(piece: Piece, stream: io.BufferedReader, limit: int) -> bytes | Reject:
    """All bytes of a file of up to `limit`, or the reject for one that is longer, cut short or damaged."""
    try:
        data = streams.bounded_bytes(stream, limit)
    except streams.Damaged as error:
        return cut_short(piece, error, 0)
    return too_long(piece, "the file", f"more than {limit:,} bytes") if data is None else data


def without_front_matter(lines: Iterator[str | Reject | Note]) -> Iterator[str | Reject | Note]:
    """The lines after a block between `---` and `---` or `...` at the very top: data about the page."""
    held: list[str | Reject | Note] = []
    for item in lines:
        held.append(item)
        if not isinstance(item, str):
            continue
        first = len(held) == 1
        if first and item.rstrip(" \t\r\n") != "---":
            break
        if not first and item.rstrip(" \t\r\n") in ("---", "..."):
            held = [item for item in held if not isinstance(item, str)]
            break
        if len(held) > LONGEST_FRONT_MATTER:
            break
    yield from held
    yield from lines


def pieces(lines: Iterable[str | Reject | Note], piece_chars: int) -> Iterator[str | Reject | Note]:
    """Pieces of about `piece_chars`, cut at blank lines or headings, in a run of text without them at any line."""
    piece: list[str] = []
    size = 0
    for item in lines:
        if not isinstance(item, str):
            yield item
            continue
        boundary = not item.strip() or item.startswith("#")
        if (size >= piece_chars and boundary) or size >= 2 * piece_chars:
            yield "".join(piece).strip("\r\n")
            piece, size = [], 0
        piece.append(item)
        size += len(item)
    if piece:
        yield "".join(piece).strip("\r\n")
