"""The step `pii`: personal data redacted, tagged, or reason to drop the document, by its kind."""

from __future__ import annotations

import hashlib
from collections import Counter

from llmctl.text.cleaning.kinds import Routed, with_meta, with_text
from llmctl.text.cleaning.params import PiiKind, PiiParams
from llmctl.text.cleaning.personal_data import FINDERS, find
from llmctl.text.cleaning.step import Drop, Noted, Outcome
from llmctl.text.documents import Document

HASHED = 16
"""Hexadecimal digits of a value's hash."""


class PersonalData(Routed):
    """Finds personal data and does with it what `PiiParams` say for its kind; the rest of the text stays as it is."""

    name = "pii"

    def __init__(self, params: PiiParams, seed: int) -> None:
        super().__init__(params)
        self._params = params
        self._actions = params.actions()
        self._wanted: frozenset[PiiKind] = frozenset(self._actions)

    def clean(self, document: Document) -> Outcome:
        """Redact, tag or drop. Tags are {kind, start, end, hash} under `meta.pii`, places in the new text."""
        found = find(document.text, self._wanted, self._params.region)
        if not found:
            return document
        counts = Counter[str](kind for _, _, kind in found)
        if unwanted := next((kind for _, _, kind in found if self._actions[kind] == "drop"), None):
            return Drop(f"holds {unwanted}", ", ".join(f"{kind}: {count}" for kind, count in counts.items()))
        text, tags = self._edited(document.text, found)
        changed = with_text(document, text)
        if self._params.hashes or any(self._actions[kind] == "tag" for _, _, kind in found):
            changed = with_meta(changed, pii=tags)
        return Noted(changed, counts)

    def _edited(self, text: str, found: list[tuple[int, int, PiiKind]]) -> tuple[str, list[dict[str, object]]]:
        """The new text, and what is known of each place in it."""
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).digest()
        parts: list[str] = []
        tags: list[dict[str, object]] = []
        length = done = 0
        for start, end, kind in found:
            value = text[start:end]
            shown = self._params.replacement.replace("{kind}", kind.upper())
            put = shown if self._actions[kind] == "redact" else value
            parts += [text[done:start], put]
            length += start - done
            tag: dict[str, object] = {"kind": kind, "start": length, "end": length + len(put)}
            tags.append({**tag, "hash": hashed(value, key)} if self._params.hashes else tag)
            length += len(put)
            done = end
        return "".join([*parts, text[done:]]), tags


def masked(text: str) -> str:
    """The text with the kind of everything that is personal data in its place: for reports."""
    parts, done = [], 0
    for start, end, kind in find(text, frozenset(FINDERS), "US"):
        parts += [text[done:start], f"<{kind.upper()}>"]
        done = end
    return "".join([*parts, text[done:]])


def hashed(value: str, key: bytes) -> str:
    """A hash of a value that only those who have the whole text before redaction can make, or try values against.

    Without the key a card or telephone number could be found by trying all of them.
    """
    return hashlib.blake2b(value.encode("utf-8", "surrogatepass"), key=key, digest_size=HASHED // 2).hexdigest()
