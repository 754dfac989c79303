"""From files to digests: list a directory, hash many files at once, make them durable."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmctl.store.manifest import NAME, FileEntry

BLOCK = 1 << 20


class NotPlain(ValueError):
    """An artifact holds something other than plain files of its own; the message names it."""


def hash_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_files(paths: Sequence[Path]) -> list[str]:
    """Digests of many files, in order; hashlib releases the interpreter lock, so threads help."""
    if len(paths) < 2:
        return [hash_file(path) for path in paths]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_file, paths))


def plain_files(directory: Path) -> list[str]:
    """Relative paths of everything in an artifact's directory but its manifest, sorted.

    Raises NotPlain for links and devices: onnx refuses symbolic and hard links, so no artifact has any.
    """
    found = []
    for path in _walk(directory):
        relative = path.relative_to(directory).as_posix()
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise NotPlain(f"`{relative}` is a symbolic link")
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise NotPlain(f"`{relative}` is no regular file")
        if status.st_nlink > 1:
            raise NotPlain(f"`{relative}` has several hard links")
        if relative != NAME:
            found.append(relative)
    return sorted(found)


def _walk(directory: Path) -> Iterable[Path]:
    for path in directory.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def entries(directory: Path, names: Sequence[str]) -> list[FileEntry]:
    """Size and digest of the named files."""
    digests = hash_files([directory / name for name in names])
    return [
        FileEntry(name, (directory / name).stat().st_size, digest) for name, digest in zip(names, digests, strict=True)
    ]


def sync(path: Path) -> None:
    """Force a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a file and force it to the disk; the name becomes durable with `sync(path.parent)`."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
