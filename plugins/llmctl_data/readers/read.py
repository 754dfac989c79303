"""One piece of a source to documents: opens it, sees whether it can be text, and lets the reader of its format work."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from llmctl.text.datasets import read_records
from llmctl.text.documents import Document
from llmctl_data.parts import read_documents
from llmctl_data.readers import markup, pdf, plain, records, streams, tables, xml_records
from llmctl_data.readers.listing import text_document
from llmctl_data.readers.piece import SPOOL, Note, Piece, Reject

Read = Callable[[Piece, io.BufferedReader, int], Iterator[Document | Reject | Note]]
READERS: dict[str, Read] = {
    "txt": plain.read_text_file,
    "markdown": plain.read_text_file,
    "code": plain.read_code,
    "html": markup.read_html,
    "pdf": pdf.read_pdf,
    "jsonl": records.read_jsonl,
    "json": records.read_json,
    "csv": records.read_table,
    "tsv": records.read_table,
    "parquet": records.read_parquet,
    "xml": xml_records.read_xml,
    "html-tables": tables.read_tables,
}
BINARY = frozenset({"pdf", "parquet"})


def read_piece(piece: Piece) -> Iterator[Document | Reject | Note]:
    """Everything that a piece gives. White-space-only documents are rejects, too: nothing is lost without a word."""
    for item in _read(piece):
        if not isinstance(item, Document):
            yield item
        elif item.text.strip():
            if item.text.isascii() or _is_unicode(item.text):
                yield with_source(item, piece)
            else:
                detail = f"{item.id} holds half of a surrogate pair, which no encoding can write"
                yield Reject(piece.name, "broken character", detail, hint="mend the escape \\uD8xx")
        else:
            yield Reject(piece.name, "empty document", f"{item.id} holds only white space", fault=False)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_source(document: Document, piece: Piece) -> Document:
    """What the source says of all its documents, unless the document knows better, and how it was read."""
    told = piece.options.get("meta") or {}
    return replace(document, meta={**told, **document.meta}) if told else document


def _read(piece: Piece) -> Iterator[Document | Reject | Note]:
    limit = int(piece.options["max_document_bytes"])
    if piece.format == SPOOL:
        yield from (document for document, _ in read_documents(Path(piece.path)))
        return
    if piece.format == "dataset.text":
        yield from _dataset(piece)
        return
    if piece.format.startswith("reader:"):
        yield from records.read_by_plugin(piece, limit)
        return
    try:
        with streams.open_raw(piece.path) as raw:
            if piece.start and piece.format not in BINARY:
                raw.seek(piece.start)
            stream = streams.unpack(raw, piece.name)
            if piece.format not in BINARY and piece.part == 0 and (fault := _no_text(piece, stream)):
                yield fault
                return
            yield from READERS[piece.format](piece, stream, limit)
    except OSError as error:
        yield Reject(
            piece.name, "unreadable", f"cannot be read: {error.strerror or error}", hint="check its permissions"
        )


def _dataset(piece: Piece) -> Iterator[Document]:
    """The rows of one file of a `dataset.text`, in its split. InputError for one that is damaged or has no text."""
    split = str(piece.options["split"])
    path = Path(piece.path)
    mark = f"{piece.part}-" if piece.part else ""
    for number, row in read_records(path):
        yield text_document(row, split, number, path.parent if path.parent.name else path, f"{split}/{mark}{number}")


def _no_text(piece: Piece, stream: io.BufferedReader) -> Reject | None:
    """Why a file of text cannot be one."""
    try:
        head = stream.peek(streams.HEAD)[: streams.HEAD]
    except streams.DAMAGED as error:
        return plain.cut_short(piece, error, 0)
    except OSError as error:
        if error.errno is None:
            return plain.cut_short(piece, error, 0)
        raise
    if not head:
        return Reject(piece.name, "empty file", "the file is empty", fault=False)
    if streams.is_binary(head) and piece.format not in ("html", "html-tables", "xml"):
        return Reject(piece.name, "binary file", "it holds zero bytes: binary data, no text", hint="leave it out")
    return None
