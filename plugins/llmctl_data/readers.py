"""Files to documents: .txt, .md, .jsonl and .parquet, compressed or not, from files, directories and globs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llmctl import Artifact, InputError
from llmctl.text.datasets import read_lines, read_records, read_rows, splits

TEXT = (".txt", ".txt.gz")
MARKDOWN = (".md", ".markdown", ".md.gz")
RECORDS = (".jsonl", ".jsonl.gz", ".parquet")
SUPPORTED = (*TEXT, *MARKDOWN, *RECORDS)
FEW = 20
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)?(---|\.\.\.)[ \t]*(\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A row of `dataset.text`. Documents with the same `unit` go to the same split; `split` fixes it."""

    id: str
    source: str
    text: str
    unit: str = ""
    split: str = ""


def read_files(inputs: Sequence[Artifact], column: str, piece_chars: int) -> Iterator[Document]:
    """Documents of all files in order of their names, white-space-only ones left out.

    A row of a JSONL or Parquet file is a document; a text file is one, or several pieces if it is long. With many text
    files whole files go to a split, with few their pieces do. InputError names whatever cannot be read.
    """
    files = list_files(inputs)
    whole = sum(not path.name.lower().endswith(RECORDS) for _, path in files) >= FEW
    for name, path in files:
        if path.name.lower().endswith(RECORDS):
            documents = _records(name, path, column)
        else:
            documents = _text(name, path, piece_chars, whole)
        yield from (document for document in documents if document.text.strip())


def read_text(source: Artifact) -> Iterator[Document]:
    """Documents of a `dataset.text`; their splits stay as they are."""
    for split in splits(source):
        for number, row in enumerate(read_rows(source, split), start=1):
            if not isinstance(row.get("text"), str):
                raise InputError(
                    f"{source.path}: row {number} of `{split}` has no text", hint="a dataset.text has a column `text`"
                )
            identity = str(row.get("id", f"{split}/{number}"))
            yield Document(identity, str(row.get("source", identity)), row["text"], identity, split)


def list_files(inputs: Sequence[Artifact], supported: tuple[str, ...] = SUPPORTED) -> list[tuple[str, Path]]:
    """(name relative to what the user gave, path) of every file, sorted; hidden files are left out."""
    found: list[tuple[str, Path]] = []
    parents = [artifact.path.absolute().parent for artifact in inputs]
    shared = {parent for parent in parents}
    for artifact, parent in zip(inputs, parents, strict=True):
        if artifact.path.is_dir():
            for path in artifact.path.rglob("*"):
                relative = path.relative_to(artifact.path)
                if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                    found.append((relative.as_posix(), path))
        elif artifact.path.is_file():
            found.append((_name(artifact.path, parent, shared), artifact.path))
        else:
            raise InputError(f"{artifact.path} does not exist")
    for _, path in found:
        if not path.name.lower().endswith(supported):
            raise InputError(
                f"{path} is of a type that cannot be read",
                hint=f"supported: {', '.join(supported)}; choose files with a glob such as 'notes/**/*.md'",
            )
    return sorted(found)


def _name(path: Path, parent: Path, parents: set[Path]) -> str:
    """The file's name, with its directories below the common one where files come from several."""
    if len(parents) == 1:
        return path.name
    common = parent
    while not all(other.is_relative_to(common) for other in parents):
        common = common.parent
    return path.absolute().relative_to(common).as_posix()


def _records(name: str, path: Path, column: str) -> Iterator[Document]:
    for number, row in read_records(path):
        text = row.get(column)
        if not isinstance(text, str):
            columns = ", ".join(sorted(map(str, row))) or "none"
            fault = "holds no text" if column in row else "is missing"
            raise InputError(
                f"{path}:{number}: column `{column}` {fault}", hint=f"columns here: {columns}; set `column`"
            )
        identity = f"{name}#{number}"
        yield Document(identity, name, text, identity)


def _text(name: str, path: Path, piece_chars: int, whole: bool) -> Iterator[Document]:
    lines: Iterator[str] = (line for _, line in read_lines(path))
    if path.name.lower().endswith(MARKDOWN):
        # Front matter is data about the page; pages are short enough to be read at once.
        lines = iter(FRONT_MATTER.sub("", "".join(lines)).splitlines(keepends=True))
    for number, text in enumerate(_pieces(lines, piece_chars)):
        identity = f"{name}#{number}"
        yield Document(identity, name, text, name if whole else identity)


def _pieces(lines: Iterator[str], piece_chars: int) -> Iterator[str]:
    """Pieces of about `piece_chars`, cut at blank lines or headings, in a run of text without them at any line."""
    piece: list[str] = []
    size = 0
    for line in lines:
        boundary = not line.strip() or line.startswith("#")
        if (size >= piece_chars and boundary) or size >= 2 * piece_chars:
            yield "".join(piece).strip("\r\n")
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece).strip("\r\n")


def title_of(source: str) -> str:
    """What a person calls a source: the file's name without its endings."""
    name = PurePosixPath(source).name
    for ending in sorted(SUPPORTED, key=len, reverse=True):
        name = name.removesuffix(ending)
    return name or source
