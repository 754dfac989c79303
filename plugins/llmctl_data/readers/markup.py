"""HTML: the main text of a page, without what surrounds it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from llmctl import MachineError
from llmctl.text.documents import Document
from llmctl_data.readers import streams
from llmctl_data.readers.piece import Note, Piece, Reject
from llmctl_data.readers.plain import whole_file

CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{2,40})", re.IGNORECASE)
HEAD = 4096
INSTALL = "pip install 'llmctl[data]'"


def read_html(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """One document; a page in which no main text is found is a reject."""
    data = whole_file(piece, stream, limit)
    if isinstance(data, Reject):
        yield data
        return
    page, encoding = decode_page(data, str(piece.options.get("encoding", "auto")))
    if encoding != "utf-8":
        yield Note(piece.name, encoding, f"read as {encoding}")
    extract = {"trafilatura": with_trafilatura, "resiliparse": with_resiliparse}[piece.options["html"]]
    text, meta = extract(page)
    if not text.strip():
        detail = f"{piece.options['html']} finds no main text in the page"
        yield Reject(piece.name, "page without text", detail, hint="try another value of `html`", fault=False)
        return
    yield Document(piece.name, piece.name, text, piece.name, meta=meta)


def decode_page(data: bytes, asked: str = "auto") -> tuple[str, str]:
    """The page as text and the encoding: the one asked for, a byte order mark's, the page's own, UTF-8, cp1252."""
    marked, length = streams.mark_of(data)
    declared = CHARSET.search(data[:HEAD])
    named = declared[1].decode("ascii") if declared else ""
    for encoding in (*((asked,) if asked != "auto" else ()), marked, named, "utf-8", "cp1252"):
        if encoding:
            try:
                return data[length:].decode(encoding), "utf-8" if encoding.lower() == "utf8" else encoding.lower()
            except (UnicodeDecodeError, LookupError):
                continue
    return data.decode("latin-1"), "latin-1"


def with_trafilatura(page: str) -> tuple[str, dict[str, Any]]:
    """The better of the two (5 of 5 parts of a page, no boilerplate), about 1 MB/s."""
    try:
        from trafilatura import bare_extraction
    except ModuleNotFoundError as error:
        raise MachineError("reading HTML needs trafilatura", hint=INSTALL) from error
    found: Any = bare_extraction(page, favor_precision=True, include_comments=False, with_metadata=True)
    if found is None:
        return "", {}
    named = {"title": found.title, "date": found.date, "url": found.url, "license": found.license}
    return found.text or "", {key: value for key, value in named.items() if value}


def with_resiliparse(page: str) -> tuple[str, dict[str, Any]]:
    """The faster one, about 20 MB/s: for bulk."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
    except ModuleNotFoundError as error:
        raise MachineError("reading HTML in bulk needs resiliparse", hint=INSTALL) from error
    tree = HTMLTree.parse(page)
    text: str = extract_plain_text(tree, main_content=True, comments=False)
    return text, {"title": tree.title} if tree.title else {}
