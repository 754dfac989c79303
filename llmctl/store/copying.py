"""Copy an artifact out of the store: real copies, never links, put in place in one step."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.store.hashing import plain_files
from llmctl.store.layout import own_name, sweep_dead
from llmctl.store.manifest import NAME

FICLONE = 0x40049409
"""Linux ioctl: share the blocks of another file (btrfs, xfs); ext4 refuses, then bytes are copied."""


def materialise(artifact: Artifact, target: Path, *, force: bool = False) -> None:
    """Put a copy of `artifact` at `target`; an older artifact there is replaced in one step.

    What a copy that was killed has left beside it is removed.
    InputError if something else is there, unless `force`.
    """
    check_target(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_dead(target.parent, f".{target.name}-")
    fresh = target.with_name(f".{target.name}-{own_name()}")
    old = fresh.with_name(fresh.name + "-old")
    try:
        fresh.mkdir()
        for name in [*plain_files(artifact.path), NAME]:
            if (artifact.path / name).exists():
                _copy(artifact.path / name, fresh / name)
        if os.path.lexists(target):
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def copy_signatures(folder: Path, target: Path) -> None:
    """Put the signatures in `folder` into `<target>.signatures/`, in place of those of whatever was there before."""
    beside = target.with_name(target.name + ".signatures")
    for old in beside.glob("*.sig"):
        old.unlink()
    for path in sorted(folder.glob("*.sig")):
        beside.mkdir(exist_ok=True)
        shutil.copy(path, beside / path.name)
    if beside.is_dir() and not any(beside.iterdir()):
        beside.rmdir()


def check_target(target: Path, *, force: bool = False) -> None:
    """Refuse to replace what llmctl did not write, and a place that cannot be written."""
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"cannot write {target}: {parent} is not a writable directory", hint="choose another directory"
        )
    if force or not os.path.lexists(target) or (target / NAME).is_file():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise InputError(
        f"{target} exists and is no llmctl artifact, it is not replaced",
        hint="move it away or choose another directory",
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        if not _clone(reader.fileno(), writer.fileno()):
            shutil.copyfileobj(reader, writer, 1 << 20)
    target.chmod(0o644)


def can_clone(directory: Path) -> bool:
    """Whether copies within a directory's file system share their blocks."""
    one, two = directory / "clone-1", directory / "clone-2"
    one.write_bytes(b"x" * 4096)
    with one.open("rb") as reader, two.open("wb") as writer:
        return _clone(reader.fileno(), writer.fileno())


def _clone(source: int, target: int) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        return False
    return True
