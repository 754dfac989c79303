"""Whether an artifact is what its manifest says: everything that is wrong with it, not only the first thing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmctl.store.hashing import hash_file
from llmctl.store.manifest import NAME, BadManifest, FileEntry, Manifest, content_id

Hashed = Callable[[int], None]


def inspect(directory: Path, id: str = "", *, deep: bool, hashed: Hashed = lambda size: None) -> list[str]:
    """What is wrong with the artifact in `directory`, a line each; empty if it is whole.

    `id` is the one it should have, if that is known from elsewhere. Sizes and kinds of files are looked at; with
    `deep` every file is hashed, several at once, and `hashed` is called with the size of each one that is done.
    """
    try:
        manifest = Manifest.read(directory)
    except FileNotFoundError:
        return [f"{directory / NAME} is missing"]
    except (OSError, BadManifest) as error:
        return [f"{directory / NAME} is damaged: {error}"]
    found = list(_identity(directory, manifest, id))
    for file in manifest.files:
        if problem := _kind(directory / file.path, file.size):
            found.append(problem)
    found += _strangers(directory, manifest)
    if deep:
        found += _contents(directory, manifest, hashed)
    return found


def _identity(directory: Path, manifest: Manifest, id: str) -> Iterator[str]:
    if content_id(manifest.type, manifest.files, manifest.type_version) != manifest.id:
        yield f"{directory / NAME} is damaged: its id is not that of its list of files"
    if id and manifest.id != id:
        yield f"{directory / NAME} is of another artifact, {manifest.id[:15]}"


def _kind(path: Path, size: int) -> str:
    try:
        status = path.lstat()
    except OSError:
        return f"{path} is missing"
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a symbolic link"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no regular file"
    return "" if status.st_size == size else f"{path} has {status.st_size} bytes instead of {size}"


def _strangers(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Files that do not belong to the artifact; hidden ones are other programs' business."""
    known = {file.path for file in manifest.files} | {NAME}
    for folder, _, files in sorted(os.walk(directory)):
        for name in sorted(files):
            relative = (Path(folder) / name).relative_to(directory)
            if relative.as_posix() not in known and not any(part.startswith(".") for part in relative.parts):
                yield f"{directory / relative} does not belong to the artifact"


def _contents(directory: Path, manifest: Manifest, hashed: Hashed) -> Iterator[str]:
    """The files of the right size whose bytes are others."""

    def differs(file: FileEntry) -> str:
        path = directory / file.path
        if _kind(path, file.size):
            return ""
        try:
            digest = hash_file(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        hashed(file.size)
        return (
            "" if digest == file.sha256 else f"{path} is damaged: its sha256 is {digest[:12]}, not {file.sha256[:12]}"
        )

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from filter(None, pool.map(differs, manifest.files))
