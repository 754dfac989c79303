"""What kind of text a document is, and steps that touch some kinds only: rules for prose break code and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmctl.text.cleaning.kind_params import Kind, StepParams
from llmctl.text.cleaning.step import Outcome
from llmctl.text.documents import Document

TABLES = ("csv", "tsv", "json", "xml", "table")


def kind_of(document: Document) -> Kind:
    """The document's kind: `meta.kind` where a reader or step set it, else by `meta.code` and `meta.format`."""
    meta = document.meta
    if (kind := meta.get("kind")) in ("prose", "code", "table", "conversation"):
        return kind  # type: ignore[no-any-return]  # one of the four
    if meta.get("code"):
        return "code"
    return "table" if meta.get("format") in TABLES else "prose"


def with_text(document: Document, text: str) -> Document:
    """The document with another text; itself where the text is the same."""
    return document if text == document.text else replace(document, text=text)


def with_meta(document: Document, **values: Any) -> Document:
    """The document with more known of it."""
    meta: Mapping[str, Any] = {**document.meta, **values}
    return replace(document, meta=meta)


class Routed:
    """A step that leaves documents of other kinds as they are; what it does to its own stands in `clean`."""

    def __init__(self, params: StepParams) -> None:
        self._kinds = frozenset(params.kinds)

    def touches(self, document: Document) -> bool:
        """Whether the step applies to this document."""
        return kind_of(document) in self._kinds

    def __call__(self, document: Document) -> Outcome:
        """The document, changed or as it is, or why it goes."""
        return self.clean(document) if self.touches(document) else document

    def clean(self, document: Document) -> Outcome:
        """What the step does to a document of its kinds."""
        raise NotImplementedError
