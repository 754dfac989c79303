"""Requests to stop or to save: which signal asked, and a descriptor to wait on. Only commands install handlers."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGUSR1: 75}
"""Exit code of a run that a signal stopped; SIGUSR1 means "checkpoint, run me again" (EX_TEMPFAIL)."""


class Stop:
    """A request to stop. The first means "checkpoint and leave", the second "leave at once"."""

    def __init__(self) -> None:
        self.requests = 0
        self.saves = 0
        """How often a checkpoint was asked for, without a stop."""
        self.code = 0
        """Exit code of the first request, 0 if there was none."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        os.set_blocking(self._read, False)

    def request(self, code: int) -> None:
        """Ask to stop with exit code `code`. Safe in a signal handler."""
        self.requests += 1
        self.code = self.code or code
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")

    def request_save(self) -> None:
        """Ask for a checkpoint. Safe in a signal handler."""
        self.saves += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")

    def fileno(self) -> int:
        """A descriptor that becomes readable on every request."""
        return self._read

    def drain(self) -> None:
        """Forget the wake-ups that were seen."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._read)
        os.close(self._write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def signals_stop() -> Iterator[Stop]:
    """Turn SIGINT, SIGTERM, SIGHUP and SIGUSR1 into requests to stop, SIGUSR2 into one to save.

    One that is ignored on entry stays ignored (`nohup`, `&`).
    """
    with Stop() as stop:

        def handler(number: int, _: FrameType | None) -> None:
            stop.request(CODES[signal.Signals(number)])

        def save(number: int, _: FrameType | None) -> None:
            stop.request_save()

        before = {number: signal.getsignal(number) for number in (*CODES, signal.SIGUSR2)}
        caught = [number for number, old in before.items() if old is not signal.SIG_IGN]
        for number in caught:
            signal.signal(number, save if number == signal.SIGUSR2 else handler)
        try:
            yield stop
        finally:
            for number in caught:
                signal.signal(number, before[number])
