"""PDF: the text layer of a document, page after page."""

from __future__ import annotations

import io
from collections.abc import Iterator

from llmctl import MachineError
from llmctl.text.documents import Document
from llmctl_data.readers.piece import Note, Piece, Reject
from llmctl_data.readers.plain import pieces, whole_file

PASSWORD = 4
"""PDFium's error code FPDF_ERR_PASSWORD."""


def read_pdf(piece: Piece, stream: io.BufferedReader, limit: int) -> Iterator[Document | Reject | Note]:
    """Documents of about `piece_chars` characters, cut at pages or blank lines; all of a file go to one split."""
    try:
        import pypdfium2
    except ModuleNotFoundError as error:
        raise MachineError("reading PDF needs pypdfium2", hint="pip install 'llmctl[data]'") from error
    data = whole_file(piece, stream, limit)
    if isinstance(data, Reject):
        yield data
        return
    try:
        book = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == PASSWORD or "password" in str(error).lower():
            hint = "remove it: qpdf --decrypt"
            yield Reject(piece.name, "password", "the PDF is protected by a password", hint=hint)
        else:
            yield Reject(piece.name, "cut short or damaged", f"no readable PDF: {error}", hint="fetch the file again")
        return
    try:
        yield from _pages(piece, book)
    finally:
        book.close()


def _pages(piece: Piece, book: object) -> Iterator[Document | Reject | Note]:
    """Documents of an opened PDF."""
    pages = len(book)  # type: ignore[arg-type]  # pypdfium2 has no types
    meta = {"pages": pages}
    rejects: list[Reject] = []
    number = 0
    for text in pieces(_lines(piece, book, pages, rejects), int(piece.options["piece_chars"])):
        if isinstance(text, str) and text.strip():
            yield Document(f"{piece.name}#{number}", piece.name, text, piece.name, meta=meta)
            number += 1
    yield from rejects
    if number == 0 and not rejects:
        detail = f"none of {pages} pages has text; they may be pictures"
        yield Reject(piece.name, "PDF without text", detail, hint="recognise the text first: ocrmypdf")


def _lines(piece: Piece, book: object, pages: int, rejects: list[Reject]) -> Iterator[str]:
    import pypdfium2

    for index in range(pages):
        try:
            page = book[index]  # type: ignore[index]  # pypdfium2 has no types
            layer = page.get_textpage()
            text = layer.get_text_range().replace("\r\n", "\n").replace("\r", "\n")
            layer.close()
            page.close()
        except pypdfium2.PdfiumError as error:
            rejects.append(Reject(piece.name, "broken page", f"it cannot be read: {error}", page=index + 1))
            continue
        # PDFium marks a hyphen at the end of a line like this, the word goes on.
        yield from text.replace("\ufffe", "").splitlines(keepends=True)
        yield "\n\n"
