"""Drops what is too short or too long."""

from __future__ import annotations

from llmctl.text.cleaning.params import LengthParams
from llmctl.text.cleaning.step import Drop, Outcome
from llmctl.text.documents import Document


class Length:
    """Drops what is too short or too long."""

    name = "length"

    def __init__(self, params: LengthParams, seed: int) -> None:
        self._least, self._most = params.min_chars, params.max_chars

    def __call__(self, document: Document) -> Outcome:
        """Judge one document."""
        length = len(document.text.strip())
        if length < self._least:
            return Drop("too short", f"{length} characters")
        if self._most is not None and length > self._most:
            return Drop("too long", f"{length} characters")
        return document
