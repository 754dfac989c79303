"""`llmctl.json`: what an artifact is, which bytes it consists of, and how it came to be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

NAME = "llmctl.json"
SCHEMA = "llmctl.artifact/v1"
TYPE_VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path with forward slashes, size in bytes, hexadecimal sha256."""

    path: str
    size: int
    sha256: str


def content_id(type: str, files: Sequence[FileEntry], type_version: int = TYPE_VERSION) -> str:
    """`sha256:…` over schema, type and the sorted file list; nothing else is part of an artifact's identity."""
    from llmctl.spec.canonical import digest

    rows = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in sort_files(files)]
    return digest({"schema": SCHEMA, "type": type, "type_version": type_version, "files": rows})


def sort_files(files: Sequence[FileEntry]) -> list[FileEntry]:
    """The order of the manifest: by path."""
    return sorted(files, key=lambda file: file.path)


class BadManifest(ValueError):
    """The text is no manifest of this version; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The parsed `llmctl.json`. `metadata` is derivable from the files, `provenance` describes the first producer."""

    id: str
    type: str
    files: tuple[FileEntry, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    type_version: int = TYPE_VERSION

    @property
    def bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `llmctl.json` holds."""
        rows = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in self.files]
        return {
            "schema": SCHEMA,
            "id": self.id,
            "type": self.type,
            "type_version": self.type_version,
            "files": rows,
            "bytes": self.bytes,
            "metadata": dict(self.metadata),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def parse(cls, text: str) -> Self:
        """The manifest in `text`; raises BadManifest."""
        try:
            raw = json.loads(text)
            schema = raw["schema"]
            if schema != SCHEMA:
                raise BadManifest(f"it is of schema {schema!r}, this llmctl knows {SCHEMA!r}")
            files = tuple(FileEntry(str(row["path"]), int(row["size"]), str(row["sha256"])) for row in raw["files"])
            return cls(
                id=str(raw["id"]),
                type=str(raw["type"]),
                files=files,
                metadata=dict(raw.get("metadata") or {}),
                provenance=dict(raw.get("provenance") or {}),
                type_version=int(raw["type_version"]),
            )
        except BadManifest:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise BadManifest("it is no valid manifest") from error

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest in `directory`; FileNotFoundError without one, BadManifest if it cannot be understood."""
        return cls.parse((directory / NAME).read_text(encoding="utf-8"))

    def damage(self, directory: Path) -> str:
        """The first file that is missing or of another size, in words; empty if all sizes fit. Reads no contents."""
        for file in self.files:
            path = directory / file.path
            try:
                size = path.stat().st_size
            except OSError:
                return f"{path} is missing"
            if size != file.size:
                return f"{path} has {size} bytes instead of {file.size}"
        return ""
