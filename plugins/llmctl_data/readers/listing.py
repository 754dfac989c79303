"""The files of what was bound, by names relative to what the user gave; documents of another stage's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl import Artifact, InputError
from llmctl.text.documents import Document
from llmctl_data.readers.formats import SUPPORTED


def text_document(row: Mapping[str, Any], split: str, number: int, path: Path, name: str) -> Document:
    """The document of a row of `dataset.text`, called `name` if it has no id. InputError if it has no text."""
    text = row.get("text")
    if not isinstance(text, str):
        raise InputError(f"{path}: row {number} of `{split}` has no text", hint="a dataset.text has a column `text`")
    identity = str(row.get("id", name))
    meta = row.get("meta")
    return Document(
        identity, str(row.get("source", identity)), text, identity, split, meta if isinstance(meta, dict) else {}
    )


def list_files(inputs: Sequence[Artifact], supported: tuple[str, ...] = SUPPORTED) -> list[tuple[str, Path]]:
    """(name relative to what the user gave, path) of every file, sorted; hidden files are left out.

    InputError for the first that has none of the `supported` endings.
    """
    found = names(inputs)
    for _, path in found:
        if not path.name.lower().endswith(supported):
            raise InputError(
                f"{path} is of a type that cannot be read",
                hint=f"supported: {', '.join(supported)}; choose files with a glob such as 'notes/**/*.md'",
            )
    return found


def names(inputs: Sequence[Artifact]) -> list[tuple[str, Path]]:
    """The same, whatever the files are."""
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
    return sorted(found)


def _name(path: Path, parent: Path, parents: set[Path]) -> str:
    """The file's name, with its directories below the common one where files come from several."""
    if len(parents) == 1:
        return path.name
    common = parent
    while not all(other.is_relative_to(common) for other in parents):
        common = common.parent
    return path.absolute().relative_to(common).as_posix()
