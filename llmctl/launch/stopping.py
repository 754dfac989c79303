"""Requests to stop or to save that reach a stage: signals, and files in its work directory that any machine can write.

A stage asks `Context.should_stop()`; one that never asks has no checkpoint to write and is ended where it reports.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from llmctl.stage import SAVE_FILE, STOP_FILE
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


class SaveFlag:
    """True once for each request to save, which is the file `SAVE` until it was heard."""

    def __init__(self, work: Path) -> None:
        self._file = work / SAVE_FILE
        self._looks_at = 0.0

    def __call__(self) -> bool:
        """Whether to write a checkpoint and go on."""
        now = time.monotonic()
        if now < self._looks_at:
            return False
        self._looks_at = now + PAUSE
        found = self._file.exists()
        self._file.unlink(missing_ok=True)
        return found


def signal_saves(work: Path) -> None:
    """From now on SIGUSR2 is a request to save, for this process or for the ranks that it has started."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        (work / SAVE_FILE).touch()

    signal.signal(signal.SIGUSR2, on_signal)


def ask(layout: Layout, resume_key: str, file: str = STOP_FILE) -> None:
    """Ask everyone who works on this resume key to stop, or with `SAVE_FILE` to save."""
    for directory in _directories(layout, resume_key):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / file).touch()


def clear(layout: Layout, resume_key: str) -> None:
    """Take such a request back, if there is one."""
    for directory in _directories(layout, resume_key):
        (directory / STOP_FILE).unlink(missing_ok=True)


def _directories(layout: Layout, resume_key: str) -> Iterator[Path]:
    """The work directory, and those of further runners at the same time."""
    first = layout.work(resume_key)
    yield first
    yield from first.parent.glob(f"{first.name}.*")
