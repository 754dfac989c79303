"""Repair of what encodings and copying broke; correct text comes back byte for byte."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from llmctl.errors import MachineError
from llmctl.text.cleaning.kinds import Routed, with_text
from llmctl.text.cleaning.params import UnicodeParams
from llmctl.text.cleaning.step import Noted, Outcome
from llmctl.text.documents import Document

ROUNDS = 8
# Tab and newline are text; C1 controls are what is left of Windows-1252 bytes when ftfy could not read them.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029]")
# A zero-width space marks words in Thai, Lao, Burmese and Khmer; joiners shape Arabic, Indic letters and emoji.
SPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
ZERO_WIDTH = re.compile(
    f"[\u00ad\u2060\ufeff\u180e]|(?<![{SPACED}])\u200b|(?<=[\t\n -\u024f])[\u200c\u200d]+(?=[\t\n -\u024f]|\\Z)"
    "|\\A[\u200c\u200d]+"
)
TRAILING = re.compile(r"[ \t\u00a0\u3000]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{4,}")
BLANKS = re.compile(r"(?<=\S)[ \t\u00a0\u2000-\u200a\u202f\u205f\u3000]{2,}|(?<=\S)\t+(?=\S)")


class UnicodeRepair(Routed):
    """Repairs texts as `UnicodeParams` say; doing it twice changes nothing more."""

    name = "unicode"

    def __init__(self, params: UnicodeParams, seed: int) -> None:
        super().__init__(params)
        self._params = params
        self._fix: Any = None
        if params.repair:
            try:
                import ftfy
            except ImportError as error:
                raise MachineError("ftfy is not installed", hint="pip install 'llmctl[data]'") from error
            self._fix = ftfy.fix_encoding

    def clean(self, document: Document) -> Outcome:
        """The document with its text repaired."""
        text, changes = self.repair(document.text)
        return Noted(with_text(document, text), changes) if changes else document

    def repair(self, text: str) -> tuple[str, Counter[str]]:
        """The repaired text, and how many characters or places each kind of repair touched."""
        changes: Counter[str] = Counter()
        for _ in range(ROUNDS):  # what one repair uncovers is the next round's
            repaired = self._once(text, changes)
            if repaired == text:
                break
            text = repaired
        return text, changes

    def _once(self, text: str, changes: Counter[str]) -> str:
        params = self._params
        ascii_only = text.isascii()
        if self._fix is not None and not ascii_only:
            text = _noted(text, self._fix(text), "encoding", changes)
        if params.line_ends:
            text = _substituted(LINE_ENDS, "\n", text, "line_ends", changes)
        if params.controls:
            text = _substituted(CONTROLS, "", text, "controls", changes)
        if not ascii_only:
            if params.zero_width:
                text = _substituted(ZERO_WIDTH, "", text, "zero_width", changes)
            if params.form != "none" and not unicodedata.is_normalized(params.form, text):
                text = _noted(text, unicodedata.normalize(params.form, text), "normalised", changes)
        if params.white_space == "keep":
            return text
        if params.white_space == "collapse":
            text = _substituted(BLANKS, " ", text, "blanks", changes)
        text = _substituted(TRAILING, "", text, "trailing_blanks", changes)
        return _substituted(BLANK_LINES, "\n\n\n", text, "blank_lines", changes)


def _substituted(pattern: re.Pattern[str], by: str, text: str, what: str, changes: Counter[str]) -> str:
    text, count = pattern.subn(by, text)
    if count:
        changes[what] += count
    return text


def _noted(before: str, after: str, what: str, changes: Counter[str]) -> str:
    if after != before:
        changes[what] += 1
    return after
