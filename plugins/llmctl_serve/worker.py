"""One thread that drives an engine: requests and departures come in between two steps, answers go out after each.

The event loop never waits for the model, and the engine is never shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmctl import InputError, UsageError
from llmctl.engine import Engine, EngineStats, Event, QueueFullError, Request
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import Exchange
from llmctl_serve.speech import Piece, Speech

PATIENCE = 1.0
"""Seconds that the end of a server waits for a step."""


@dataclass(frozen=True)
class Prompt:
    """A request to the engine, and what becomes of its answers."""

    request: Request
    choices: Sequence[Sequence[int]]
    """For every answer of the engine the choices of the response that it is: several where greedy ones are equal."""
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    only_scores: bool = False
    """Nothing is to be generated: the prompt's scores are the answer."""


@dataclass
class _Running:
    """A prompt that the engine has."""

    job: Job
    prompt: Prompt
    speeches: list[Speech]
    left: int


@dataclass(eq=False)
class Job:
    """All that one HTTP request wants. `pieces` is read in the event loop; None ends it."""

    prompts: Sequence[Prompt]
    exchange: Exchange
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    pieces: asyncio.Queue[Piece | BaseException | None] = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    left: int = 0
    """Prompts without a complete answer."""

    def __post_init__(self) -> None:
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self.left = len(self.prompts)

    def end(self, error: BaseException) -> None:
        """In the event loop: whoever waits for anything of it is told this."""
        self.accept(error)
        self.pieces.put_nowait(error)

    def accept(self, error: BaseException | None = None) -> None:
        """In the event loop: say whether the engine has taken it."""
        if self.accepted.done():
            return
        if error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)


class Worker:
    """Owns an engine. Everything public may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        warn: Callable[[str], None],
        name: str = "",
        stepped: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._engine, self._tokenizer, self._warn = engine, tokenizer, warn
        self._stepped = stepped
        """Told after each step how many answers it advanced."""
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._running: dict[int, _Running] = {}
        self._later: deque[tuple[Job, Prompt]] = deque()
        """Further prompts of accepted jobs, until the engine's queue has room."""
        self._outbox: list[tuple[Job, Callable[[], None]]] = []
        self._open: set[Job] = set()
        """Jobs that somebody waits for; each leaves with `cancel`, which ends it whether or not it is over."""
        self._stats = engine.stats()
        self._stopping = self._closed = self._dead = False
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._work, name=f"engine {name}".strip(), daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stats(self) -> EngineStats:
        """The engine's counts after its last step."""
        return self._stats

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return self._stats.waiting + len(self._later)

    @property
    def alive(self) -> bool:
        """Whether the thread runs, so that requests are answered."""
        return not self._dead and self._thread.is_alive()

    async def submit(self, job: Job) -> None:
        """Hand a job in and wait until the engine has taken it, which is at most a step.

        ApiError 429 if too many wait, 503 if the worker stops, UsageError for a prompt that cannot be answered.
        """
        self._open.add(job)
        if not self._send(lambda: self._begin(job)):
            raise died() if self._dead else stopping()
        try:
            await job.accepted
        except asyncio.CancelledError:
            self.cancel(job)
            raise

    def cancel(self, job: Job) -> None:
        """Nobody wants the answers any more. Harmless for a job that is over."""
        self._open.discard(job)
        if not job.cancelled:
            job.cancelled = True
            self._send(lambda: self._drop(job))

    def stop(self) -> None:
        """Answer everything that is left with 503, close the engine and end the thread. May be called twice.

        Where a step takes long, as one of an engine that answers in turn may, the clients are told before it ends, and
        the thread is left to end by itself.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is None:
            return
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            for job in list(self._open):
                job.exchange.cut = job.exchange.cut or "shutdown"
                with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody waits
                    job.loop.call_soon_threadsafe(job.end, stopping())

    def _send(self, command: Callable[[], None]) -> bool:
        """Have the thread do something; False if it has ended."""
        with self._changed:
            if not self._closed:
                self._inbox.append(command)
                self._changed.notify()
            return not self._closed

    # In the thread

    def _work(self) -> None:
        try:
            while self._wait():
                self._turn()
            self._refuse_all(stopping(), "shutdown")
        except BaseException as error:  # nobody else would tell the clients, who wait for this thread
            self._dead = True
            self._warn(f"the engine's thread has ended: {type(error).__name__}: {error}")
            self._refuse_all(died(), "engine_died")
        try:
            self._engine.close()
        except Exception as error:  # everybody has been told; the memory is the process's matter now
            self._warn(f"the engine could not be closed: {type(error).__name__}: {error}")

    def _turn(self) -> None:
        """What came in, one step, and what goes out."""
        # One further prompt of an accepted job before new jobs, which would take every place that becomes free; the
        # rest behind them, and only what keeps the slots full, as they would take every place from new jobs.
        self._submit_later(one=True)
        while self._inbox:
            self._inbox.popleft()()
        self._submit_later()
        if self._engine.busy:
            for event in self._step():
                self._deliver(event)
        self._stats = self._engine.stats()
        self._flush()

    def _wait(self) -> bool:
        """Until there is something to do; False when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._stopping or self._engine.busy or self._later)
            return not self._stopping

    def _step(self) -> list[Event]:
        try:
            events = self._engine.step()
        except Exception as error:  # whatever a model raises must reach the clients and not end the thread
            self._warn(f"a step of the engine failed: {type(error).__name__}: {error}")
            tickets = list(self._running)
            for ticket in tickets:
                self._engine.cancel(ticket)
            return [Event(ticket, error=error) for ticket in tickets]
        if advanced := len({(event.ticket, event.choice) for event in events if event.tokens}):
            self._stepped(advanced)  # a step that only read prompts has no batch
        return events

    def _begin(self, job: Job) -> None:
        """Give the engine the first prompt; its refusal is the job's."""
        if job.cancelled:
            return
        if self._dead:
            self._post(job, lambda: job.accept(died()))
            return
        first, *others = job.prompts
        try:
            self._submit(job, first)
        except QueueFullError as error:
            wait = min(60, max(1, round(self._seconds * self._stats.waiting / max(1, self._stats.slots))))
            full = ApiError(429, error.message, code="queue_full", headers={"Retry-After": str(wait)})
            self._post(job, lambda: job.accept(full))
        except Exception as error:  # a UsageError, or whatever a model raises: the client is told, the thread goes on
            refusal = error
            self._post(job, lambda: job.accept(refusal))
        else:
            self._later += [(job, prompt) for prompt in others]
            self._post(job, job.accept)

    def _submit(self, job: Job, prompt: Prompt) -> None:
        speeches = [
            Speech(self._tokenizer, prompt.stop, prompt.stop_ids, prompt.request.logprobs is not None)
            for _ in prompt.choices
        ]
        ticket = self._engine.submit(prompt.request)  # last, as a ticket that nobody knows would keep its slot
        self._running[ticket] = _Running(job, prompt, speeches, len(speeches))

    def _submit_later(self, one: bool = False) -> None:
        while self._later:
            stats = self._engine.stats()
            if not one and stats.waiting >= max(1, stats.slots // 2):
                return
            job, prompt = self._later[0]
            try:
                self._submit(job, prompt)
            except QueueFullError:
                return
            except Exception as error:  # as in `_begin`
                self._fail(job, error)
                continue
            self._later.popleft()
            if one:
                return

    def _deliver(self, event: Event) -> None:
        """Turn what a step did for one answer into pieces of the response."""
        running = self._running.get(event.ticket)
        if running is None:
            return
        job, prompt = running.job, running.prompt
        if event.error is not None:
            if not isinstance(event.error, UsageError | InputError):  # which are the client's own
                self._warn(f"generation failed: {type(event.error).__name__}: {event.error}")
            self._fail(job, event.error)
            return
        if event.admitted is not None:
            job.exchange.admitted(at=event.admitted)
            return
        job.exchange.admitted(event.cached)
        speech, targets = running.speeches[event.choice], prompt.choices[event.choice]
        if speech.over:
            return
        if prompt.only_scores:
            piece = speech.silent(event)
        else:
            piece = speech.take(event)
            job.exchange.emitted(piece.tokens, targets[0])
        if piece.empty:
            return
        for target in targets:
            self._post(job, lambda index=target: job.pieces.put_nowait(piece.to(index)))  # type: ignore[misc]
        if piece.finish_reason is not None:
            if event.finish_reason is None:
                self._engine.cancel(event.ticket, event.choice)  # a stop string: its slot is free
            self._finish(event.ticket, running)

    def _finish(self, ticket: int, running: _Running) -> None:
        """One answer is complete."""
        running.left -= 1
        if running.left:
            return
        del self._running[ticket]
        job = running.job
        job.left -= 1
        if not job.left:
            self._seconds += 0.2 * (time.perf_counter() - job.submitted - self._seconds)
            self._post(job, lambda: job.pieces.put_nowait(None))

    def _fail(self, job: Job, error: BaseException) -> None:
        self._drop(job)
        self._post(job, lambda: job.pieces.put_nowait(error))

    def _drop(self, job: Job) -> None:
        """Free everything that the engine holds for a job."""
        for ticket in [ticket for ticket, running in self._running.items() if running.job is job]:
            if not self._dead:
                self._engine.cancel(ticket)
            del self._running[ticket]
        self._later = deque(one for one in self._later if one[0] is not job)

    def _refuse_all(self, error: ApiError, cut: str) -> None:
        """Tell everybody who still waits, those included whose request lies in the inbox."""
        while self._drain_inbox():
            pass
        left = [*(one.job for one in self._running.values()), *(job for job, _ in self._later)]
        for job in {id(job): job for job in left}.values():
            job.exchange.cut = job.exchange.cut or cut
            self._fail(job, error)
        self._flush()

    def _drain_inbox(self) -> bool:
        """Do what was asked for; False once nothing is left, and from then on nothing more is taken."""
        with self._changed:
            commands, self._inbox = self._inbox, deque()
            self._closed = not commands
        for command in commands:
            command()
        return bool(commands)

    def _post(self, job: Job, action: Callable[[], None]) -> None:
        """Have the event loop do something; sent after the step, all at once."""
        self._outbox.append((job, action))

    def _flush(self) -> None:
        sent, self._outbox = self._outbox, []
        for loop in {job.loop for job, _ in sent}:
            actions = [action for job, action in sent if job.loop is loop]
            try:
                loop.call_soon_threadsafe(_all, actions)
            except RuntimeError:  # the loop is closed: nobody is there to be told
                for job in {id(job): job for job, _ in sent if job.loop is loop}.values():
                    self._drop(job)


def stopping() -> ApiError:
    """What a request is told that the server's end has met."""
    return ApiError(503, "the server is stopping", code="shutting_down")


def died() -> ApiError:
    """What a request is told whose model has lost its thread."""
    return ApiError(
        503,
        "the model's engine has failed; load the model again (`POST /admin/models`) or start the server anew",
        code="engine_failed",
    )


def _all(actions: Sequence[Callable[[], None]]) -> None:
    for action in actions:
        action()
