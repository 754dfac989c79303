"""The commit protocol (`pipeline.md` 2.6): a committed artifact is whole or not there, whatever is killed when."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.store.guard import finding, mark_used
from llmctl.store.hashing import entries, sync, write_durably
from llmctl.store.layout import Layout, digest_of
from llmctl.store.manifest import NAME, BadManifest, Manifest, content_id, sort_files

OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


def commit(
    layout: Layout,
    directory: Path,
    type: str,
    names: Sequence[str],
    *,
    metadata: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Manifest:
    """Move the staged `directory` with the files `names` into the store; it is gone afterwards.

    If the same bytes are there already, ours are dropped, and we are recorded as a later producer.
    """
    files = sort_files(entries(directory, names))
    manifest = Manifest(
        id=content_id(type, files), type=type, files=tuple(files), metadata=metadata, provenance=provenance
    )
    _seal(directory, manifest)
    final = layout.artifact(manifest.id)
    final.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            directory.rename(final)
            sync(final.parent)
            return manifest
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        with finding(layout):
            existing = intact(final)
            if existing is not None:
                mark_used(final)
        if existing is not None:
            shutil.rmtree(directory)
            _record(layout, existing, provenance)
            return existing
        _quarantine(layout, final)


def intact(directory: Path) -> Manifest | None:
    """The manifest of a directory whose files all have the right size, else None.

    In a store it must also be that of the id which the directory is called after.
    """
    try:
        manifest = Manifest.read(directory)
    except (OSError, BadManifest):
        return None
    stored = directory.parts[-4:-1] == ("artifacts", "sha256", directory.name[:2])
    if stored and directory.name != digest_of(manifest.id):
        return None
    return None if manifest.damage(directory) else manifest


def _seal(directory: Path, manifest: Manifest) -> None:
    """Make the files durable and read-only, and write the manifest last: it is the mark of a whole artifact."""
    for file in manifest.files:
        path = directory / file.path
        path.chmod(0o444)
        sync(path)
    for path in {(directory / file.path).parent for file in manifest.files} - {directory}:
        sync(path)
    target = directory / NAME
    write_durably(target, json.dumps(manifest.to_json(), indent=2) + "\n")
    target.chmod(0o444)
    sync(directory)


def _record(layout: Layout, existing: Manifest, provenance: Mapping[str, Any]) -> None:
    """Note another producer of the same bytes, once per key."""
    key = str(provenance.get("key", ""))
    if key and key != existing.provenance.get("key"):
        path = layout.record(existing.id, key)
        if not path.exists():
            replace_json(layout, path, {"id": existing.id, "provenance": dict(provenance)})


def _quarantine(layout: Layout, directory: Path) -> None:
    """Move a damaged artifact out of the way; another process may have done so already."""
    try:
        directory.rename(layout.trash("damaged", directory.name))
    except FileNotFoundError:
        return


def replace_json(layout: Layout, path: Path, value: Mapping[str, Any]) -> None:
    """Write a small JSON file atomically, over whatever is there."""
    _temporary(layout, path, value).replace(path)
    sync(path.parent)


def create_json(layout: Layout, path: Path, value: Mapping[str, Any]) -> bool:
    """Write a small JSON file atomically if there is none; False if there is. The name appears with its content.

    On a file system without links the last writer wins, which is harmless: any published result is a valid one.
    """
    temporary = _temporary(layout, path, value)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def _temporary(layout: Layout, path: Path, value: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = layout.temporary()
    write_durably(temporary, json.dumps(value, indent=2, sort_keys=True) + "\n")
    return temporary
