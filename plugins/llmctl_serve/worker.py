"""One thread that generates, fed by a bounded queue: the event loop stays free and the model is never shared."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmctl import LlmctlError
from llmctl.engine import EngineStats
from llmctl.generator import Generator, Sampling
from llmctl.text.streaming import Delta, stream_text
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import Exchange
from llmctl_serve.logprobs import TokenScore, score_tokens


@dataclass(frozen=True)
class Choice:
    """One answer to generate; `scored` asks for log-probabilities, with that many alternatives per token."""

    index: int
    prompt: Sequence[int]
    sampling: Sampling
    stop: Sequence[str] = ()
    scored: int | None = None


@dataclass(frozen=True)
class Piece:
    """A part of the answer `index`; the last one has a finish reason, and scores if they were asked for."""

    index: int
    delta: Delta
    scores: list[TokenScore] = field(default_factory=list)


class QueueFullError(Exception):
    """Too many requests wait; `retry_after` is an estimate in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already")
        self.waiting, self.retry_after = waiting, retry_after


class Job:
    """The answers to one request, generated one after the other. `pieces` is read in the event loop; None ends it."""

    def __init__(self, choices: Sequence[Choice], loop: asyncio.AbstractEventLoop, exchange: Exchange) -> None:
        self.choices = list(choices)
        self.pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self.cancelled = threading.Event()
        self.submitted = time.perf_counter()
        self._loop = loop
        self.exchange = exchange

    def put(self, item: Piece | BaseException | None) -> None:
        """Hand something to the event loop from the worker's thread; dropped once nobody reads."""
        try:
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, item)
        except RuntimeError:  # the loop is closed: the server has stopped
            self.cancelled.set()


class Worker:
    """Generates for jobs in the order in which they came."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        max_queue: int,
        warn: Callable[[str], None],
    ) -> None:
        self._generator, self._tokenizer, self._warn = generator, tokenizer, warn
        self._max_queue = max_queue
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stats(self) -> EngineStats:
        """What waits and what runs."""
        return EngineStats(waiting=len(self._waiting), running=int(self._running is not None), slots=1)

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Append a job; QueueFullError if `max_queue` wait already."""
        with self._changed:
            if self._stopping or len(self._waiting) >= self._max_queue:
                waiting = len(self._waiting)
                raise QueueFullError(waiting, min(60, max(1, round(self._seconds * waiting))))
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer any more: leave the queue, or stop after the current token."""
        with self._changed:
            job.cancelled.set()
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Answer everything that is left with 503 and end the thread. A second call changes nothing."""
        with self._changed:
            self._stopping = True
            left = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._changed.notify()
        for job in left:
            job.cancelled.set()
            job.put(ApiError(503, "the server is stopping", code="shutting_down"))
        self._thread.join()

    def _work(self) -> None:
        while (job := self._take()) is not None:
            started = time.perf_counter()
            job.exchange.admitted()
            try:
                for choice in job.choices:
                    if not job.cancelled.is_set():
                        self._generate(job, choice)
                job.put(None)
            except LlmctlError as error:
                job.put(error)
            except Exception as error:  # whatever a model raises must reach its client and not end the thread
                self._warn(f"generation failed: {type(error).__name__}: {error}")
                job.put(error)
            finally:
                self._running = None
                self._seconds += 0.2 * (time.perf_counter() - started - self._seconds)

    def _take(self) -> Job | None:
        """The next job, as soon as there is one; None when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if self._stopping:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _generate(self, job: Job, choice: Choice) -> None:
        ids: list[int] = []
        text = ""
        stream = stream_text(self._generator, self._tokenizer, choice.prompt, choice.sampling, choice.stop)
        for delta in stream:
            job.exchange.emitted(len(delta.token_ids), choice.index)
            ids += delta.token_ids
            text += delta.text
            if job.cancelled.is_set():
                stream.close()  # type: ignore[attr-defined]  # a generator: ends the model's own stream
                return
            scores: list[TokenScore] = []
            if delta.finish_reason and choice.scored is not None:
                scores = score_tokens(self._generator, self._tokenizer, choice.prompt, ids, text, choice.scored)
            job.put(Piece(choice.index, delta, scores))
