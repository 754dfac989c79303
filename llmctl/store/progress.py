"""How far long work on bytes has come, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from llmctl.console import HEARTBEAT, human_bytes, wants_bars

SMALL = 1 << 26
"""Less than this is done before a bar could be read."""


class Meter:
    """Counts bytes from any thread. A context manager."""

    def __init__(self, verb: str, total: int) -> None:
        self.verb = verb
        self.total = total
        self.done = 0
        self._lock = threading.Lock()
        self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.total >= SMALL and wants_bars(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn()
            self._bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
            self._task = self._bar.add_task(self.verb, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, count: int) -> None:
        """`count` more bytes are done."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(self._task, completed=self.done)
            elif time.monotonic() - self._said >= HEARTBEAT:
                self._said = time.monotonic()
                sys.stderr.write(f"{self.verb}: {human_bytes(self.done)} of {human_bytes(self.total)}\n")
                sys.stderr.flush()
