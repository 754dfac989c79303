"""What a reader makes of a source and a cleaning step passes on: a text, its origin, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """A row of `dataset.text`. Documents with the same `unit` go to the same split; `split` fixes it.

    `meta` holds JSON values under the names that every reader and step uses where it knows them: `language` (ISO 639-1,
    or 639-3 where there is none), `license`, `url`, `date` (ISO 8601), `title`, `path`, `format`, `page`, `position`,
    `code` (a programming language: the text is source code and no step for prose touches it), `corpus` (the declared
    name of its source), `label` (its class), `parent` and `method` (what it was derived from, and how).
    """

    id: str
    source: str
    text: str
    unit: str = ""
    split: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The row of `dataset.text`; `meta` only where there is any."""
        row: dict[str, Any] = {"id": self.id, "source": self.source, "text": self.text}
        if self.meta:
            row["meta"] = dict(self.meta)
        return row
