"""`flock` on a descriptor: saves two processes the same work. Results are right without it, and no lock goes stale."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PAUSES = (0.001, 0.005, 0.02)
"""Seconds after which a lock is tried again: it may be `running` that only looks whether somebody has it."""


class Lock:
    """A held lock. The kernel drops it when the last process that has the descriptor ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def release(self) -> None:
        """Let go; may be called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def try_lock(path: Path, run: str = "") -> Lock | None:
    """Take the lock and write who holds it, or None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _flock(descriptor):
            os.close(descriptor)
            return None
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # garbage collection removed the file between open and flock
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S"), "run": run}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    return Lock(descriptor)


def _flock(descriptor: int) -> bool:
    for pause in (*PAUSES, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if pause is not None:
                time.sleep(pause)
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def running(path: Path) -> str | None:
    """The run that holds a lock (empty if it does not say), None if nobody does.

    To see that, it holds the lock itself for an instant, shared with all who look; `try_lock` outwaits that.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(os.pread(descriptor, 4096, 0))["run"])
        return ""
    finally:
        os.close(descriptor)
    return None


def holder(path: Path) -> str:
    """Who holds a lock, for a message: `pid 4711 on host, since 12:30:01`."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        return f"pid {found['pid']} on {found['host']}, since {found['since']}"
    return "another process"
