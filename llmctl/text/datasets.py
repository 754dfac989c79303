"""Datasets as directories of JSON Lines: read the rows of a split, write them byte for byte reproducibly.

`<split>-00000-of-0000N.jsonl.gz` with a `dataset_info.json`; other tools' `<split>.jsonl`, `.jsonl.gz` and `.parquet`
are read too, alone (split `train`) or in a directory.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llmctl.errors import InputError, MachineError
from llmctl.stage import Artifact

Row = dict[str, Any]
INFO = "dataset_info.json"
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
FILE = re.compile(r"(?P<split>.+?)(-\d{5})?(-of-\d{5})?(\.jsonl|\.jsonl\.gz|\.parquet)\Z")
SHARD_BYTES = 256 << 20


def read_rows(source: Artifact | Path | str, split: str = "train") -> Iterator[Row]:
    """The rows of `split`, in order, one at a time.

    InputError names the file and line of whatever is damaged, or the splits there are when this one is missing.
    """
    path = _path(source)
    files = split_files(path)
    if split not in files:
        raise InputError(f"{path} has no split `{split}`", hint=f"it has: {', '.join(files) or 'none'}")
    return (row for file in files[split] for _, row in read_records(file))


def splits(source: Artifact | Path | str) -> list[str]:
    """Names of the splits, `train` and `validation` first."""
    return list(split_files(_path(source)))


def info(source: Artifact | Path | str) -> dict[str, Any]:
    """The contents of `dataset_info.json`, {} where there is none."""
    path = _path(source) / INFO
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    return found


def split_files(path: Path) -> dict[str, list[Path]]:
    """Files of each split. InputError if `path` holds no dataset or a listed file is missing."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path} is no dataset file", hint=f"supported: {', '.join(SUFFIXES)}")
        return {"train": [path]}
    if not path.is_dir():
        raise InputError(f"{path} does not exist")
    listed = info(path).get("splits")
    found: dict[str, list[Path]] = {}
    if isinstance(listed, dict) and all("files" in split for split in listed.values()):
        for name, split in listed.items():
            found[name] = [path / file for file in split["files"]]
        for file in (file for files in found.values() for file in files):
            if not file.is_file():
                raise InputError(f"{file} is missing, though {INFO} lists it", hint="make the dataset again")
    else:
        for file in sorted(path.iterdir()):
            if match := FILE.match(file.name):
                found.setdefault(match["split"], []).append(file)
    if not found:
        raise InputError(f"{path} holds no dataset", hint=f"give {', '.join(SUFFIXES)} files or a directory of them")
    first = {"train": 0, "validation": 1}
    return dict(sorted(found.items(), key=lambda item: (first.get(item[0], 2), item[0])))


def read_records(path: Path) -> Iterator[tuple[int, Row]]:
    """(line or row number from 1, row) of one .jsonl, .jsonl.gz or .parquet file; InputError with the position."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    for number, text in read_lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}:{number}: no valid JSON: {error}", hint="one JSON object per line") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a {type(row).__name__}, not an object", hint="one JSON object per line")
        yield number, row


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a UTF-8 file, compressed if its name ends in .gz.

    InputError if it cannot be read, is cut short, or holds bytes that are no UTF-8.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            lines: BinaryIO = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]  # a reader of bytes
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        where = f"{path}:{number}: byte {error.object[error.start]:#04x} at column {error.start + 1} is no UTF-8"
        raise InputError(where, hint="convert the file to UTF-8 (iconv -f … -t utf-8)") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: the gzip data is cut short or damaged ({error})") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MachineError(f"reading {path.name} needs pyarrow", hint="pip install 'llmctl[data]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: row {number + 1}: no readable Parquet: {error}") from error


def row_texts(row: Mapping[str, Any]) -> list[str]:
    """Every text of a row of `dataset.text` or `dataset.labelled`."""
    if isinstance(row.get("tokens"), list):
        return [" ".join(map(str, row["tokens"]))]
    # `source` alone is where a document comes from.
    names = ("text", "pair", "positive", "context", "question", *(("source", "target") if "target" in row else ()))
    return [row[name] for name in names if isinstance(row.get(name), str)]


def text_bytes(row: Mapping[str, Any]) -> int:
    """UTF-8 bytes of what a row says: its texts, its messages, or its prompt and both answers."""
    if texts := row_texts(row):
        return sum(len(text.encode()) for text in texts)
    messages = [m for key in ("messages", "prompt", "chosen", "rejected") for m in row.get(key) or ()]
    return sum(len(str(message["content"]).encode()) for message in messages)


class DatasetWriter:
    """Writes a dataset directory; equal rows give equal bytes. Use as a context manager or call `close`.

    Every split in `splits` exists when closed, empty if nothing was added to it.
    """

    def __init__(
        self, directory: Path, format: str, splits: tuple[str, ...] = (), shard_bytes: int = SHARD_BYTES
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._format, self._shard_bytes = directory, format, shard_bytes
        self._splits: dict[str, _Split] = {}
        self._columns: list[str] = []
        for split in splits:
            self._open(split)

    def _open(self, split: str) -> _Split:
        self._splits[split] = _Split(self._directory, split, self._shard_bytes)
        return self._splits[split]

    def add(self, split: str, row: Mapping[str, Any]) -> None:
        """Append a row to `split`."""
        self._columns += [name for name in row if name not in self._columns]
        (self._splits.get(split) or self._open(split)).add(row)

    def rows(self, split: str) -> int:
        """How many rows `split` has so far."""
        return self._splits[split].rows if split in self._splits else 0

    def bytes(self, split: str) -> int:
        """UTF-8 bytes of text that `split` has so far."""
        return self._splits[split].bytes if split in self._splits else 0

    def close(self) -> dict[str, Any]:
        """Give the files their names, write `dataset_info.json` and return its contents."""
        described = {
            name: {"rows": split.rows, "bytes": split.bytes, "files": split.close()}
            for name, split in self._splits.items()
        }
        contents = {"format": self._format, "splits": described, "columns": self._columns}
        text = json.dumps(contents, indent=2, sort_keys=True) + "\n"
        (self._directory / INFO).write_text(text, encoding="utf-8")
        return contents

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            for split in self._splits.values():
                split.abandon()


def packed(raw: BinaryIO) -> io.TextIOWrapper:
    """Lines into a gzip member; no name and no time in its header, so that equal rows are equal bytes."""
    member = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6)
    return io.TextIOWrapper(member, encoding="utf-8", newline="\n")


def pack_row(row: Mapping[str, Any]) -> tuple[bytes, int]:
    """A row as a member of a dataset's file, and the characters that it takes unpacked."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    raw = io.BytesIO()
    lines = packed(raw)
    lines.write(line)
    lines.close()
    return raw.getvalue(), len(line)


Member = tuple[str, Path | bytes, int, int, int]
"""Split, a gzip member (in a file or here), its rows, UTF-8 bytes of their text, characters unpacked."""


def join_members(
    directory: Path,
    format: str,
    splits: Sequence[str],
    members: Iterable[Member],
    columns: Sequence[str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a dataset out of members that were packed elsewhere: their bytes are joined, not unpacked.

    Equal members in equal order give equal bytes. Every split in `splits` exists afterwards, as with `DatasetWriter`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    opened: dict[str, _Joined] = {split: _Joined(directory, split, shard_bytes) for split in splits}
    for split, member, rows, size, written in members:
        if split not in opened:
            opened[split] = _Joined(directory, split, shard_bytes)
        opened[split].add(member, rows, size, written)
    described = {
        name: {"rows": split.rows, "bytes": split.bytes, "files": split.close()} for name, split in opened.items()
    }
    contents = {"format": format, "splits": described, "columns": list(columns)}
    text = json.dumps(contents, indent=2, sort_keys=True) + "\n"
    (directory / INFO).write_text(text, encoding="utf-8")


class _Joined:
    """The files of one split, each of some members."""

    def __init__(self, directory: Path, name: str, shard_bytes: int) -> None:
        self._directory, self._name, self._shard_bytes = directory, name, shard_bytes
        self._parts: list[Path] = []
        self._written = 0
        self.rows = self.bytes = 0

    def add(self, member: Path | bytes, rows: int, size: int, written: int) -> None:
        if not self._parts or self._written >= self._shard_bytes:
            self._parts.append(self._directory / f".{self._name}-{len(self._parts):05d}.part")
            self._parts[-1].write_bytes(b"")
            self._written = 0
        with self._parts[-1].open("ab") as file:
            if isinstance(member, bytes):
                file.write(member)
            else:
                with member.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        self._written += written
        self.rows += rows
        self.bytes += size

    def close(self) -> list[str]:
        if not self._parts:
            empty = io.BytesIO()
            packed(empty).close()
            self.add(empty.getvalue(), 0, 0, 0)
        names = []
        for number, part in enumerate(self._parts):
            name = f"{self._name}-{number:05d}-of-{len(self._parts):05d}.jsonl.gz"
            part.rename(self._directory / name)
            names.append(name)
        return names


class _Split:
    """The files of one split while they are written; their names need the number of files, so they come last."""

    def __init__(self, directory: Path, name: str, shard_bytes: int) -> None:
        self._directory, self._name, self._shard_bytes = directory, name, shard_bytes
        self._parts: list[Path] = []
        self._raw: BinaryIO | None = None
        self._lines: io.TextIOWrapper | None = None
        self._written = 0
        self.rows = 0
        self.bytes = 0
        self._next()

    def _next(self) -> None:
        self.abandon()
        part = self._directory / f".{self._name}-{len(self._parts):05d}.part"
        self._parts.append(part)
        self._raw = part.open("wb")
        self._lines = packed(self._raw)
        self._written = 0

    def add(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        if self._written >= self._shard_bytes:
            self._next()
        assert self._lines is not None
        self._lines.write(line)
        self._written += len(line)
        self.rows += 1
        self.bytes += text_bytes(row)

    def abandon(self) -> None:
        if self._lines is not None and self._raw is not None:
            self._lines.close()
            self._raw.close()
            self._lines = self._raw = None

    def close(self) -> list[str]:
        self.abandon()
        names = []
        for number, part in enumerate(self._parts):
            name = f"{self._name}-{number:05d}-of-{len(self._parts):05d}.jsonl.gz"
            part.rename(self._directory / name)
            names.append(name)
        return names


def _path(source: Artifact | Path | str) -> Path:
    return source.path if isinstance(source, Artifact) else Path(source)
