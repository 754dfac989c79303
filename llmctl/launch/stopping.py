"""Requests to stop that reach a stage: signals, and the file `STOP` in its work directory, which any machine can write.

A stage asks `Context.should_stop()`; one that never asks has no checkpoint to write and is ended where it reports.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from llmctl.stage import STOP_FILE
from llmctl.store.layout import Layout

GRACE = 30.0
"""Seconds between the request to stop and SIGKILL, unless told otherwise; Slurm's default KillWait is the same."""
PAUSE = 0.5
"""Seconds between two looks at the file: asking must cost a training step nothing."""


class StopFlag:
    """Set by a signal, unless it is not to listen to any, or by the file. It makes no sound: the stage asks."""

    def __init__(self, work: Path, signals: bool = True) -> None:
        self.asked = False
        self._set = False
        self._file = work / STOP_FILE
        self._looks_at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) if signals else ():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._set = True

    def _is_set(self) -> bool:
        now = time.monotonic()
        if not self._set and now >= self._looks_at:
            self._looks_at = now + PAUSE
            self._set = self._file.exists()
        return self._set

    def set(self) -> None:
        """Ask it to stop from within its own process."""
        self._set = True

    def __call__(self) -> bool:
        """Whether to stop; asking marks the stage as one that writes checkpoints."""
        self.asked = True
        return self._is_set()

    @property
    def ends_silent_stage(self) -> bool:
        """Whether to stop a stage that does not ask."""
        return not self.asked and self._is_set()


def ask(layout: Layout, resume_key: str) -> None:
    """Ask everyone who works on this resume key to stop."""
    for directory in _directories(layout, resume_key):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / STOP_FILE).touch()


def clear(layout: Layout, resume_key: str) -> None:
    """Take such a request back, if there is one."""
    for directory in _directories(layout, resume_key):
        (directory / STOP_FILE).unlink(missing_ok=True)


def _directories(layout: Layout, resume_key: str) -> Iterator[Path]:
    """The work directory, and those of further runners at the same time."""
    first = layout.work(resume_key)
    yield first
    yield from first.parent.glob(f"{first.name}.*")
