"""Readers: from a file, or a part of one, to documents, and to one reject for whatever could not be read.

`formats` says which reader a file gets, `streams` gives bytes and lines (from anywhere, unpacked, of bounded length),
`plain`, `markup`, `pdf` and `records` make documents. A reader is a generator of `Document`, `Reject` and `Note`; it
raises nothing for a file that is not as it should be, so that no file can be lost and none can stop the others.
"""

from __future__ import annotations

from llmctl.text.documents import Document
from llmctl_data.readers.formats import RECORDS, SUPPORTED, title_of
from llmctl_data.readers.listing import list_files
from llmctl_data.readers.piece import Note, Piece, Reject

__all__ = ["RECORDS", "SUPPORTED", "Document", "Note", "Piece", "Reject", "list_files", "title_of"]
