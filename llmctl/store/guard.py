"""So that nothing is thrown away while somebody reaches for it.

Whoever finds an artifact (a cache hit, a name, a commit of bytes that are there already) takes the guard shared, checks
the files and marks the directory as used now. Garbage collection takes it exclusively for each single artifact, looks
at the mark again and renames. Both hold it for an instant, never while they work, and the kernel drops it when a
process dies: nothing waits for long, and nothing goes stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from llmctl.store.layout import Layout


@contextlib.contextmanager
def finding(layout: Layout) -> Iterator[None]:
    """While this is held, nothing is taken away. In a store that cannot be written there is nothing to hold."""
    with _held(layout, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def taking(layout: Layout) -> Iterator[None]:
    """While this is held, nobody is between finding an artifact and marking it as used."""
    with _held(layout, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _held(layout: Layout, how: int) -> Iterator[None]:
    # In a directory that is no store yet there is nothing to guard, and nothing may be left.
    descriptor = _open(layout.guard) if (layout.root / "store.json").exists() else None
    try:
        if descriptor is not None:
            fcntl.flock(descriptor, how)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
    except OSError:
        pass
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def mark_used(directory: Path) -> None:
    """Note that an artifact is needed now; in a store of somebody else that is the owner's business."""
    with contextlib.suppress(OSError):
        os.utime(directory)
