"""Processes that do the tasks of a plan. One task, or one worker, needs none: it is done here."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmctl.errors import BY_EXIT_CODE, LlmctlError, StageError
from llmctl_data.plan import folder
from llmctl_data.tasks import Worker

Done = Callable[[], None]


class Pool:
    """Does tasks, `workers` at a time. Use it within `opened`."""

    def __init__(self, work: Path, workers: int) -> None:
        self._work, self._most = work, workers
        self._here: Worker | None = None
        self._workers: list[_Process] = []
        self._answers: queue.Queue[tuple[_Process, dict[str, Any] | None]] = queue.Queue()

    def run(self, phase: str, numbers: Sequence[int], done: Done, stop: Callable[[], bool]) -> bool:
        """Do all tasks of a phase that are not done yet, `done()` after each; False if `stop` said so before the end.

        Raises what a task raised, of several that of the lowest number; StageError for a worker that died.
        """
        left = []
        for number in numbers:
            if folder(self._work, phase, number).is_dir():
                done()
            else:
                left.append(number)
        if len(left) <= 1 or self._most == 1:
            return self._alone(phase, left, done, stop)
        return self._together(phase, left, done, stop)

    def _alone(self, phase: str, numbers: Sequence[int], done: Done, stop: Callable[[], bool]) -> bool:
        self._here = self._here or Worker(self._work)
        for number in numbers:
            if stop():
                return False
            self._here.do(phase, number)
            done()
        return True

    def _together(self, phase: str, numbers: Sequence[int], done: Done, stop: Callable[[], bool]) -> bool:
        while len(self._workers) < min(self._most, len(numbers)):
            self._workers.append(_Process(self._work, self._answers))
        waiting = list(reversed(numbers))
        busy = 0
        stopped = False
        errors: list[tuple[int, LlmctlError]] = []
        for process in self._workers:
            if waiting:
                process.ask(phase, waiting.pop())
                busy += 1
        while busy:
            process, answer = self._answers.get()
            busy -= 1
            if answer is None:
                raise StageError(
                    f"a worker ended with code {process.code()} in task {process.asked}",
                    hint="code -9 is often a lack of memory: lower `workers`; what it said stands above",
                )
            if "error" in answer:
                kind = BY_EXIT_CODE.get(answer["exit_code"], StageError)
                errors.append((answer["number"], kind(answer["error"], hint=answer["hint"])))
            else:
                done()
            stopped = stopped or stop()
            if waiting and not errors and not stopped:
                process.ask(phase, waiting.pop())
                busy += 1
        if errors:
            raise min(errors, key=lambda item: item[0])[1]
        return not waiting

    def close(self) -> None:
        """End all processes."""
        for process in self._workers:
            process.close()


@contextmanager
def opened(work: Path, workers: int) -> Iterator[Pool]:
    """A pool whose processes end with the block."""
    pool = Pool(work, workers)
    try:
        yield pool
    finally:
        pool.close()


class _Process:
    """A worker: `python -m llmctl_data.tasks --serve`, and the thread that reads its answers."""

    def __init__(self, work: Path, answers: queue.Queue[tuple[_Process, dict[str, Any] | None]]) -> None:
        # Each does one thing at a time: the libraries' own threads would only fight over the cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "llmctl_data.tasks", "--serve", str(work)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
        )
        self.asked = ""
        self._answers = answers
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def ask(self, phase: str, number: int) -> None:
        """Have one task done."""
        self.asked = f"{phase}/{number}"
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its end is an answer, too
            self._process.stdin.write(f"{phase} {number}\n")
            self._process.stdin.flush()

    def code(self) -> int:
        """How it ended."""
        return self._process.wait()

    def close(self) -> None:
        """End it: at once if it is at work, since what it does can be done again."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put((self, json.loads(line)))
        self._answers.put((self, None))
