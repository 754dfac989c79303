"""Cut documents into chunks of limited length that follow their structure and point back into the text exactly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from semchunk.semchunk import chunkerify

from llmctl.text.retrieval import Chunk

Counter = Callable[[str], int]
"""Length of a text in tokens."""
Heading = tuple[int, int, str]
"""Where a heading begins, how deep it is, its title."""
FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$")
DEFINITION = re.compile(r"^(\s*)(?:async\s+def|def|class)\s+(\w+)\s*[(:]")


@dataclass(frozen=True)
class Section:
    """`text[start:end]` of a document, below the headings `path`."""

    start: int
    end: int
    path: tuple[str, ...]


def words(text: str) -> int:
    """Number of words: the length of a text where no tokenizer is at hand."""
    return len(text.split())


def sections(text: str) -> Iterator[Section]:
    """The parts of a text between its headings; joined they are the text.

    Headings are the lines that define a Python function or class; in a text without any, Markdown's `#` lines outside
    code fences. A deeper heading stands below the one before it.
    """
    stack: list[tuple[int, str]] = []
    start = 0
    for at, depth, title in list(_definitions(text)) or list(_markdown(text)):
        if at > start:
            yield Section(start, at, tuple(name for _, name in stack))
        start = at
        while stack and stack[-1][0] >= depth:
            stack.pop()
        stack.append((depth, title))
    if len(text) > start:
        yield Section(start, len(text), tuple(name for _, name in stack))


def _lines(text: str) -> Iterator[tuple[str, int]]:
    at = 0
    for line in text.split("\n"):
        yield line, at
        at += len(line) + 1


def _outside_fences(text: str) -> Iterator[tuple[str, int]]:
    fence = ""
    for line, at in _lines(text):
        mark = FENCE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif not fence:
            yield line, at


def _definitions(text: str) -> Iterator[Heading]:
    for line, at in _outside_fences(text):
        if found := DEFINITION.match(line):
            yield at, len(found[1].expandtabs()), found[2]


def _markdown(text: str) -> Iterator[Heading]:
    for line, at in _outside_fences(text):
        if found := HEADING.match(line):
            yield at, len(found[1]), found[2]


class Chunker:
    """Cuts documents into chunks of at most `limit` by `count`; equal texts give equal chunks.

    Neighbouring sections share a chunk while they fit; a section that is too long is cut by semchunk at the best
    boundary there is (paragraph, line, sentence, word), with `overlap` repeated from the cut before.
    """

    def __init__(self, count: Counter, limit: int, overlap: int = 0) -> None:
        self._count, self._limit, self._overlap = count, limit, overlap
        # semchunk's annotations are a union over all its options.
        self._cut: Callable[..., Any] = chunkerify(count, limit, memoize=False)

    def chunks(self, document: str, text: str, title: str = "") -> list[Chunk]:
        """The chunks of one document, in order; every character that is no white space is in one of them."""
        found: list[Chunk] = []
        for start, end, paths in self._spans(text):
            start, end = _strip(text, start, end)
            if start < end:
                heading = " ".join(dict.fromkeys([title, *(_dotted(title, path) for path in paths)])).strip()
                found.append(Chunk(f"{document}/{len(found)}", document, start, end, text[start:end], heading))
        return found

    def _spans(self, text: str) -> Iterator[tuple[int, int, list[tuple[str, ...]]]]:
        """(start, end, headings inside) of each chunk."""
        packed: list[Section] = []
        size = 0
        for section in sections(text):
            # Lengths are added up, as counting every union anew would count a text many times over.
            length = self._count(text[section.start : section.end].strip())
            if size + length > self._limit:
                yield from self._close(text, packed)
                packed, size = [], 0
            packed.append(section)
            size += length
        yield from self._close(text, packed)

    def _close(self, text: str, packed: list[Section]) -> Iterator[tuple[int, int, list[tuple[str, ...]]]]:
        """One chunk of the packed sections, or several if they are too long together after all."""
        if not packed:
            return
        start, end = packed[0].start, packed[-1].end
        paths = [section.path for section in packed]
        if self._count(text[start:end].strip()) <= self._limit:
            yield start, end, paths
            return
        _, offsets = self._cut(text[start:end], offsets=True, overlap=self._overlap or None)
        yield from ((start + a, start + b, paths) for a, b in offsets)


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))


def _dotted(title: str, path: tuple[str, ...]) -> str:
    """How the place is called: `textwrap.dedent` where all names are identifiers, else the headings as they stand."""
    names = [title, *path] if title else list(path)
    if all(part.isidentifier() for name in names for part in name.split(".")):
        return ".".join(names)
    return " ".join(path)
