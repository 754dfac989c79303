"""The documentation pages as the tests read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its title if it has one, its text and where it begins."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(path.name, line, match["language"], match["title"] or "", match["text"])


PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
BLOCKS = [block for path in PAGES for block in read_blocks(path)]


@pytest.fixture(scope="session")
def pages() -> dict[str, str]:
    """Every page by its file name."""
    return {path.name: path.read_text(encoding="utf-8") for path in PAGES}
