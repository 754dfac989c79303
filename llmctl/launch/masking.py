"""Secrets must not be seen: their values become `***` in whatever a stage prints or reports."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

MASK = "***"
SHORTEST = 6
"""Values of fewer characters are not masked: they would turn up everywhere."""
CHUNK = 1 << 20
LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Halves of surrogate pairs, which JSON may hold and no encoding has.

\\udc80 to \\udcff are left out: they stand for bytes that are no UTF-8.
"""


class Masker:
    """Knows the values of secrets by name, in the forms in which they may turn up: as they are, escaped for JSON or a
    URL, and the lines of one that has several."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._names = {
            form.encode(errors="surrogateescape"): name for name, value in values.items() for form in _forms(value)
        }
        # Of two that begin alike the longer one is looked for first.
        self._longest_first = sorted(self._names, key=lambda form: (-len(form), form))
        self._pattern = re.compile(b"|".join(map(re.escape, self._longest_first))) if self._names else None

    def __bool__(self) -> bool:
        return bool(self._names)

    def text(self, text: str) -> str:
        """`text` with every secret masked; half a surrogate pair becomes U+FFFD."""
        data = LONE.sub("\N{REPLACEMENT CHARACTER}", text).encode(errors="surrogateescape")
        return self.masked(data).decode(errors="surrogateescape")

    def masked(self, data: bytes) -> bytes:
        """The same for bytes."""
        return self._pattern.sub(MASK.encode(), data) if self._pattern else data

    def plain(self, value: Any) -> Any:
        """A JSON value with every secret in its strings and keys masked."""
        if not self._names:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(name)): self.plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(item) for item in value]
        return value

    def found(self, data: bytes) -> str:
        """The name of a secret that `data` holds, empty if it holds none."""
        match = self._pattern.search(data) if self._pattern else None
        return self._names[match[0]] if match else ""

    def found_in(self, path: Path) -> str:
        """The name of a secret that a file, or what is compressed in a `.gz`, holds; empty if none does."""
        if not self._names:
            return ""
        overlap = len(self._longest_first[0]) - 1
        for chunks in (_plain(path), _decompressed(path)):
            before = b""
            for chunk in chunks:
                if name := self.found(before + chunk):
                    return name
                before = (before + chunk)[-overlap:]
        return ""

    def split(self, data: bytes) -> int:
        """How many bytes at the beginning of `data` can be masked now: a secret may go on after its end."""
        if not self._longest_first:
            return len(data)
        held = next(
            (
                start
                for start in range(max(0, len(data) - len(self._longest_first[0]) + 1), len(data))
                if any(form.startswith(data[start:]) and len(form) > len(data) - start for form in self._longest_first)
            ),
            len(data),
        )
        for match in self._pattern.finditer(data) if self._pattern else ():
            if match.start() < held < match.end():
                return match.start()
        return held


class MaskedStream:
    """Masks a stream that arrives in pieces, whatever the pieces are."""

    def __init__(self, masker: Masker) -> None:
        self._masker = masker
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown after another piece; what may be the beginning of a secret is kept back."""
        data = self._held + data
        at = self._masker.split(data)
        self._held = data[at:]
        return self._masker.masked(data[:at])

    def end(self) -> bytes:
        """What was kept back."""
        data, self._held = self._held, b""
        return self._masker.masked(data)


def _forms(value: str) -> Iterator[str]:
    lines = [line.strip() for line in value.splitlines()]
    in_url = quote(value, errors="surrogateescape")
    for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], in_url, *lines):
        if len(form) >= SHORTEST:
            yield form


def _plain(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _decompressed(path: Path) -> Iterator[bytes]:
    """The contents of a `.gz`; nothing, or what there is, of a file that is damaged or only called so."""
    if path.suffix == ".gz":
        import gzip
        import zlib

        with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(path) as file:
            while chunk := file.read(CHUNK):
                yield chunk
