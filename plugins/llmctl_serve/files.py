"""Files that a server writes: small ones replaced at one stroke, logs that grow by whole lines."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmctl import MachineError
from llmctl.spec.files import home_path

MODE = 0o600
WARN_EVERY = 60.0
"""Seconds between two warnings about one log that cannot be written."""


def replace_file(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, with mode 0600; it is on the disk on return."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class LineLog:
    """JSON lines at the end of a file, for its owner only; `-` is stderr.

    Rotation works both ways: at `max_bytes` the file becomes `NAME.1` (and so on up to `keep`), and where another
    program (logrotate) moved it away, the next line begins a new one; no signal is needed. A disk that is full costs
    lines and a warning a minute, never an answer.
    """

    def __init__(
        self, target: str, max_bytes: int = 0, keep: int = 5, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self._path = None if target == "-" else home_path(target)
        self._max_bytes, self._keep, self._warn = max_bytes, keep, warn
        self._warned = -WARN_EVERY
        self._descriptor = -1
        self._torn = False
        """Whether the file ends within a line."""
        self._lock = threading.Lock()
        if self._path is not None:
            try:
                self._open(self._path)
            except OSError as error:
                raise MachineError(
                    f"{self._path}: the log cannot be written: {error.strerror}",
                    hint="name a file in a directory that is there and yours",
                ) from error

    def _open(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, MODE)
        self._torn = False

    def write(self, fields: Mapping[str, Any]) -> None:
        """Add a line. Control characters, line breaks of every kind and what is not ASCII are escaped: no forging."""
        line = (json.dumps(fields, ensure_ascii=True, default=str).replace("\x7f", "\\u007f") + "\n").encode()
        with self._lock:
            if self._path is None:
                sys.stderr.write(line.decode())
                sys.stderr.flush()
                return
            try:
                self._turn(self._path, len(line))
                # A disk that becomes full takes a part of a line; the next one must not go on in it.
                whole = b"\n" + line if self._torn else line
                written = os.write(self._descriptor, whole)
                self._torn = not whole[:written].endswith(b"\n")
                if written < len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                if time.monotonic() - self._warned >= WARN_EVERY:
                    self._warned = time.monotonic()
                    self._warn(f"{self._path}: lines of the log are lost: {error.strerror}")

    def _turn(self, path: Path, more: int) -> None:
        """Open the file that bears the name now, after it was moved away or has grown too large."""
        mine = os.fstat(self._descriptor) if self._descriptor >= 0 else None
        try:
            there = path.stat()
        except FileNotFoundError:
            there = None
        if mine is None or there is None or not os.path.samestat(mine, there):
            self._reopen(path)
        elif self._max_bytes and there.st_size and there.st_size + more > self._max_bytes:
            for number in range(self._keep - 1, 0, -1):
                older = path.with_name(f"{path.name}.{number}")
                if older.exists():
                    older.replace(path.with_name(f"{path.name}.{number + 1}"))
            path.replace(path.with_name(f"{path.name}.1"))
            self._reopen(path)

    def _reopen(self, path: Path) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._open(path)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
