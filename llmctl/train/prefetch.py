"""The batches of the steps to come, made by a thread while the present one is computed."""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread

import torch

from llmctl.train.batches import Batch
from llmctl.train.data import Source


class Prefetch:
    """Hands out `source.micro_batches(step, rank, ranks)`, up to `ahead` steps of them made beforehand; 0: none.

    The batches are those that the source gives without a thread. On CUDA they come in pinned memory. What the source
    raises is raised by `take` of the step it belongs to. `close` waits for the thread; a closed one may be used again.
    """

    def __init__(self, source: Source, ahead: int, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        self._source, self._ahead, self._pin = source, ahead, device.type == "cuda"
        self._share = rank, ranks
        self._changed = Condition()
        self._ready: deque[list[Batch] | BaseException] = deque()
        self._thread: Thread | None = None
        self._stopping = False
        self._next = 0
        """The step whose batches come first in `_ready`."""

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of `step`. Steps are expected one after another; a jump begins anew there."""
        if not self._ahead:
            return self._make(step)
        if self._thread is None or step != self._next:
            self._start(step)
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            found = self._ready.popleft()
            self._next += 1
            self._changed.notify_all()
        if isinstance(found, BaseException):
            self.close()
            raise found
        return found

    def close(self) -> None:
        """Stop the thread; what it has made is dropped."""
        if self._thread is None:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._thread, self._stopping = None, False
        self._ready.clear()

    def _start(self, step: int) -> None:
        self.close()
        self._next = step
        self._thread = Thread(target=self._run, args=(step,), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, step: int) -> None:
        failed = False
        while not failed:
            found: list[Batch] | BaseException
            try:
                found = self._make(step)
            except BaseException as error:  # any that is not handed on would leave `take` waiting for ever
                found, failed = error, True
            with self._changed:
                self._ready.append(found)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or len(self._ready) < self._ahead)
                if self._stopping:
                    return
            step += 1

    def _make(self, step: int) -> list[Batch]:
        batches = self._source.micro_batches(step, *self._share)
        return [batch.pinned() for batch in batches] if self._pin else batches
