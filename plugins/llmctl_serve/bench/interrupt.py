"""Ctrl-C during a measurement: the load that runs is broken off, those that have ended are still reported."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupt:
    """What Ctrl-C does within a `with` block: as everywhere, until `keep` says that there is something to report.

    From then on the first one is noted and ends the loads; once they have ended, a second one ends the command.
    """

    def __init__(self) -> None:
        self.came = False
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)

    def keep(self) -> None:
        """From now on Ctrl-C ends no more than the current task, and from `release` on not even that."""
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        if self._before is not signal.SIG_IGN:  # under `nohup` it stays ignored
            signal.signal(signal.SIGINT, self._note)  # over asyncio's own, which leaves another's in place at its end

    def release(self) -> None:
        """The loads are over: what is left, the report, is not broken off by a first Ctrl-C."""
        self._task = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.came = self.came, True
        if self._task is None:
            if again:
                raise KeyboardInterrupt
        elif not again:  # requests are cancelled within milliseconds; an exception amid that would leave some open
            self._loop.call_soon_threadsafe(self._end_task)

    def _end_task(self) -> None:
        """In the event loop: a task that is cancelled by the handler just before it ends would lose its result."""
        if self._task is not None:
            self._task.cancel()
