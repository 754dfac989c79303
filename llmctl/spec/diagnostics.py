"""Where a value stands, and what is wrong with it: marks, diagnostics, `SpecError`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from llmctl.errors import UsageError

WIDEST_LINE = 160
LINE_ENDS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""What libyaml counts as the end of a line."""


@dataclass(frozen=True, eq=False)
class Text:
    """One piece of spec text: a file, or one option of the command line."""

    name: str
    """As a person knows it: the path as typed, `--set#1`."""
    content: str
    base: Path
    """Absolute directory that relative paths in this text start from."""
    rank: int = 0
    """Errors are shown in this order of their texts."""

    @cached_property
    def lines(self) -> list[str]:
        """The text by lines, without line ends."""
        return LINE_ENDS.split(self.content)

    @property
    def whole(self) -> Mark:
        """The range of the whole text, to be used for options."""
        return Mark(self, 1, 1, len(self.lines), len(self.lines[-1]) + 1)


@dataclass(frozen=True)
class Mark:
    """A range of a text; lines and columns count from 1, `end_column` is exclusive."""

    text: Text
    line: int
    column: int
    end_line: int
    end_column: int

    def __str__(self) -> str:
        return f"{self.text.name}:{self.line}:{self.column}"

    @property
    def end_on_line(self) -> int:
        """The exclusive end column, cut to the first line of the range."""
        if self.end_line == self.line:
            return max(self.end_column, self.column + 1)
        return max(len(self.text.lines[self.line - 1].rstrip()) + 1, self.column + 1)

    def part(self, fragment: str) -> Mark:
        """The first place of `fragment` within this range, or the range itself where an escape hides it."""
        for number in range(self.line, self.end_line + 1):
            line = self.text.lines[number - 1]
            start = line.find(fragment, self.column - 1 if number == self.line else 0)
            if start >= 0:
                return Mark(self.text, number, start + 1, number, start + 1 + len(fragment))
        return self


@dataclass(frozen=True)
class Diagnostic:
    """One mistake. `code` is of the table in the documentation; `mark` is None where there is no text."""

    code: str
    message: str
    mark: Mark | None = None
    hint: str = ""

    def render(self) -> str:
        """The message, the place, the line with carets, and the way out."""
        head = f"error[{self.code}]: {self.message}"
        if self.mark is None:
            return head + (f"\n  hint: {self.hint}" if self.hint else "")
        source, shift = _window(self.mark)
        before = "".join("\t" if char == "\t" else " " for char in source[: self.mark.column - 1 - shift])
        carets = "^" * min(self.mark.end_on_line - self.mark.column, max(1, len(source) - len(before)))
        gutter = " " * (len(str(self.mark.line)) + 2) + "|"
        under = f"{gutter} {before}{carets} {self.hint}".rstrip()
        return f"{head}\n  --> {self.mark}\n{gutter}\n {self.mark.line} | {source}".rstrip() + f"\n{under}"

    def as_json(self) -> dict[str, Any]:
        """For editors and CI annotations."""
        mark = self.mark
        return {
            "code": self.code,
            "message": self.message,
            "file": mark.text.name if mark else None,
            "line": mark.line if mark else None,
            "column": mark.column if mark else None,
            "end_column": mark.end_on_line if mark else None,
            "hint": self.hint or None,
        }


def _window(mark: Mark) -> tuple[str, int]:
    """The line to show and how many characters are cut off its left; a very long line is cut around the mark."""
    line = mark.text.lines[mark.line - 1].rstrip("\r")
    if len(line) <= WIDEST_LINE:
        return line, 0
    start = max(0, min(mark.column - 1 - WIDEST_LINE // 2, len(line) - WIDEST_LINE))
    return line[start : start + WIDEST_LINE], start


class SpecError(UsageError):
    """A spec that cannot be used. `str()` is the full text of all its diagnostics, each with its place."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(sorted(diagnostics, key=_order))
        first = self.diagnostics[0]
        super().__init__(self.render(), hint=None, code=first.code)

    def render(self) -> str:
        """All diagnostics, a blank line between two."""
        return "\n\n".join(diagnostic.render() for diagnostic in self.diagnostics)


def _order(diagnostic: Diagnostic) -> tuple[int, str, int, int]:
    mark = diagnostic.mark
    return (mark.text.rank, mark.text.name, mark.line, mark.column) if mark else (-1, "", 0, 0)


@dataclass
class Report:
    """Collects the mistakes of all phases, so that they are shown together."""

    diagnostics: list[Diagnostic] = field(default_factory=list)
    seen: set[object] = field(default_factory=set)

    def add(self, code: str, message: str, mark: Mark | None = None, hint: str = "", essence: str = "") -> None:
        """Note a mistake once: a value that is used twice, through a variable or `defaults`, is one mistake.

        `essence` is the message without the path that led to the value.
        """
        identity = (code, mark, essence or message)
        if identity not in self.seen:
            self.seen.add(identity)
            self.diagnostics.append(Diagnostic(code, message, mark, hint))

    def check(self) -> None:
        """Raise `SpecError` if there was any mistake."""
        if self.diagnostics:
            raise SpecError(self.diagnostics)


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of `known` that was probably meant, or nothing."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return near[0] if near else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean …?` if one of `known` is near, else nothing."""
    near = nearest(word, known)
    return f"did you mean `{near}`?" if near else ""


def suggest(word: str, known: Sequence[str], what: str) -> str:
    """The near name, or all of them when there is none: `stages: train, sft`."""
    return did_you_mean(word, known) or (f"{what}: {', '.join(known)}" if known else f"there are no {what}")
