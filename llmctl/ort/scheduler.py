"""Continuous batching over one ONNX Runtime session: requests join and leave between two steps.

A step decodes one token for every running answer in one call (or several, see `llmctl.ort.speculation`), admits
waiting requests into free slots, and reads prompts in chunks under a budget of tokens, so that a long prompt delays the
running answers by no more than that. An answer that has ended leaves its keys and values where they are: a prompt that
begins alike takes them over.

Beams are sequences of the same batch. A beam search holds as many slots as it has beams from its admission on and
advances with everybody's step, one token at a time, so it delays the others as little as as many answers would.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from llmctl.beams import BeamSearch
from llmctl.engine import EngineOptions, EngineStats, Event, QueueFullError, Request
from llmctl.errors import UsageError
from llmctl.generator import check_prompt
from llmctl.ort.adapters import number_of
from llmctl.ort.allocation import Allocation
from llmctl.ort.answers import Answers
from llmctl.ort.cache_memory import token_bytes
from llmctl.ort.options import slot_length
from llmctl.ort.prefixes import PrefixPool
from llmctl.ort.sampling import check_ids, state
from llmctl.ort.scoring import score_prompt
from llmctl.ort.slots import Slots
from llmctl.ort.speculation import open_speculation
from llmctl.ort.tasks import Lane, Task
from llmctl.ort.waiting import FairQueue

if TYPE_CHECKING:
    from llmctl.ort.generator import OrtGenerator


class OrtEngine:
    """A `llmctl.engine.Engine` over an in-place decoder."""

    def __init__(self, generator: OrtGenerator, options: EngineOptions) -> None:
        self.options = options
        self.context_length = slot_length(generator.context_length, options)
        self.vocab_size, self.eos_ids = generator.vocab_size, generator.eos_ids
        self.backend = generator.backend
        self._adapters = generator.adapters
        self._slots = Slots(generator.session, generator.layout, options.slots, self.context_length, self._adapters)
        size = options.slots * self.context_length // 2 if options.prefix_cache else 0
        self._pool = PrefixPool(size)
        try:
            self._speculation = open_speculation(self._slots, options, self.vocab_size, self.eos_ids)
        except UsageError:
            self._slots.close()
            raise
        self.cache_bytes = self._slots.memory_bytes + size * token_bytes(generator.layout)
        """Most bytes that keys and values can take, those of past sequences and of a draft model included."""
        if self._speculation is not None:
            self.cache_bytes += self._speculation.drafter.memory_bytes
        self.memory_bytes = self.cache_bytes
        """Most bytes that keys, values and adapters can take."""
        if self._adapters is not None:
            self.memory_bytes += self._adapters.memory_bytes(options.slots)
        self._allocation = Allocation(self._slots, self._pool, remembers=options.prefix_cache)
        self._answers = Answers(self._slots, self._allocation, self._speculation, self.eos_ids, self._forget)
        self._waiting: FairQueue[Task] = FairQueue()
        self._tasks: dict[int, Task] = {}
        self._reading: list[Task] = []
        """Whose prompt is being read, in the order of admission."""
        self._forking: set[Task] = set()
        """Those of the waiting ones whose prompt has been read: further draws wait for slots."""
        self._closed = False
        self._next_ticket = 0
        self._counts = EngineStats(slots=options.slots, cache_capacity=options.slots * self.context_length + size)
        self._steps = self._prompt_tokens = self._cached = 0

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """See `Engine.submit`. Requests that a free slot awaits do not count as waiting."""
        sampling = request.sampling
        if self._closed:
            raise UsageError("the engine is closed")
        check_prompt(request.prompt, self.context_length)
        check_ids(request.prompt, self.vocab_size)
        adapter = number_of(self._adapters, request.adapter)
        if sampling.beams > self.options.slots:
            raise UsageError(
                f"{sampling.beams} beams need as many slots, the engine has {self.options.slots}",
                hint=f"set beams to {self.options.slots} or less, or open the engine with more slots",
            )
        if self._queued >= self.options.max_queue + len(self._allocation.free()):
            raise QueueFullError(f"{self._queued} requests wait already", hint="try again later")
        prompt = np.asarray(request.prompt, np.int32)
        limit = min(sampling.max_new_tokens, self.context_length - len(prompt))
        task = Task(self._next_ticket, request, prompt, limit, adapter=adapter)
        singles = [sampling] * sampling.beams if sampling.beams > 1 else sampling.draws()
        for choice, single in enumerate(singles):
            made = state(single, request.prompt, self.vocab_size, request.constraint, self.eos_ids, limit)
            task.lanes.append(Lane(task, choice, made))
        if sampling.beams > 1:
            task.search = BeamSearch(sampling, self.eos_ids, limit)
        self._next_ticket += 1
        self._tasks[task.ticket] = task
        self._waiting.add(request.client, task)
        task.waits = True
        return task.ticket

    def at_once(self, request: Request) -> bool:
        """See `Engine.at_once`."""
        return request.sampling.beams > 1

    def cancel(self, ticket: int, choice: int | None = None) -> None:
        """See `Engine.cancel`. A ticket that has ended, or never was, is no mistake: the answer may just have ended."""
        task = self._tasks.get(ticket)
        if task is None:
            return
        answers = set(range(task.request.sampling.n))
        task.cancelled |= answers if choice is None else answers & {choice}
        if task.search is None:
            for lane in task.lanes:
                if lane.choice in task.cancelled and not lane.done:
                    self._answers.end(lane)
        elif len(task.cancelled) >= task.request.sampling.n:
            self._answers.end_all(task)
        if task.ticket in self._tasks and task.reading is not None and task.reading.done:
            self._read_on(task)

    @property
    def _queued(self) -> int:
        """Requests of which nothing has been begun."""
        return len(self._waiting) - len(self._forking)

    @property
    def busy(self) -> bool:
        """See `Engine.busy`."""
        return bool(self._tasks)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return replace(
            self._counts,
            waiting=self._queued,
            running=self._allocation.running,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._answers.generated,
            cached_tokens=self._cached,
            cache_used=int(self._slots.lengths.sum()) + self._pool.used,
            evictions=self._allocation.evictions + self._pool.evictions,
            drafted=self._speculation.drafted if self._speculation else 0,
            accepted=self._speculation.accepted if self._speculation else 0,
        )

    def close(self) -> None:
        """See `Engine.close`; a second call does nothing."""
        for ticket in list(self._tasks):
            self.cancel(ticket)
        self._closed = True
        self._pool.clear()
        if self._speculation is not None:
            self._speculation.close()
        self._slots.close()

    # -- a step --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """See `Engine.step`: decode, admit, read prompts, in this order, so that a slot that falls free is used."""
        events: list[Event] = []
        if not self._tasks:
            return events
        self._steps += 1
        self._decode(events)
        self._admit(events)
        self._read(events)
        return events

    def _decode(self, events: list[Event]) -> None:
        """One token for every running lane, or more where tokens were proposed and confirmed."""
        try:
            lanes = self._allocation.compact()
        except Exception as error:  # as below; what had been moved when memory ended nobody knows
            self._lose(events, error)
            return
        if not lanes:
            return
        try:
            drafts = self._speculation.drafts(lanes) if self._speculation else None
            if drafts is None:
                step = self._speculation.step if self._speculation else self._slots.step
                logits = step([lane.token for lane in lanes])  # type: ignore[misc]
                self._answers.choose(lanes, logits, events)
            else:
                self._answers.judge(lanes, drafts, events)
        except Exception as error:  # onnxruntime's share no base; whoever runs must hear of it, and the engine goes on
            self._slots.lengths[: len(lanes)] = 0  # whether keys and values were written nobody knows
            for task in {id(lane.task): lane.task for lane in lanes}.values():
                self._answers.fail(task, error, events)

    def _lose(self, events: list[Event], error: Exception) -> None:
        """No slot holds anything that is known: who has one has failed."""
        self._slots.lengths[:] = 0
        for lane in [owner for owner in self._allocation.owners if owner is not None]:
            self._answers.fail(lane.task, error, events)

    def _forget(self, task: Task) -> None:
        """The request has ended."""
        if self._tasks.pop(task.ticket, None) is None:
            return
        if task in self._reading:
            self._reading.remove(task)
        self._forking.discard(task)
        if task.waits:
            self._waiting.remove(task.request.client, task)

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _admit(self, events: list[Event]) -> None:
        """Give free slots to whose turn it is, be it a request or one more draw of a request whose prompt is read.

        Who needs more than are free waits for them, and nobody overtakes.
        """
        while len(self._waiting):
            task = self._waiting.first()
            free = len(self._allocation.free())
            if free < (len(task.lanes) if task.search is not None else 1):
                return
            self._waiting.pop()
            task.waits = False
            try:
                if task in self._forking:
                    self._fork(task, events)
                else:
                    events.append(Event(task.ticket, admitted=time.perf_counter()))
                    self._enter(task)
            except Exception as error:  # as in `_decode`: memory may end where keys and values move
                self._answers.fail(task, error, events)

    def _enter(self, task: Task) -> None:
        """The first slot for a request, whose prompt is read into it; for a beam search all slots at once."""
        first, *others = [lane for lane in task.lanes if not lane.done]
        self._begin(task, first)
        task.cached = task.fed
        self._cached += task.fed
        if task.search is not None:
            for lane in others:
                self._allocation.place(lane, np.zeros(0, np.int32))

    def _begin(self, task: Task, lane: Lane) -> None:
        """Have the prompt read into a slot of this lane."""
        task.reading = lane
        self._reading.append(task)
        task.prompt_scores = []
        known = task.prompt[:0] if task.scores_prompt else task.prompt[:-1]  # the last one's logits are needed
        task.fed = self._allocation.place(lane, known)

    def _read_on(self, task: Task) -> None:
        """The lane that the prompt was read for is gone: another answer of the request takes its place."""
        if task in self._reading:
            self._reading.remove(task)
        task.reading = None
        self._draw_more(task)

    def _draw_more(self, task: Task) -> None:
        """Further answers to a prompt wait for slots: before the other requests of the client, in its turn."""
        if task.pending and not task.waits:
            self._forking.add(task)
            self._waiting.put_back(task.request.client, task)
            task.waits = True

    def _read(self, events: list[Event]) -> None:
        """Read prompts, at most `prefill_tokens` tokens of them.

        The shortest rest comes first, as it keeps an answer waiting for the least; but the request that was admitted
        first has half of the budget, so that it is read however many short ones come.
        """
        budget = self.options.prefill_tokens
        if len(self._reading) > 1:
            oldest = self._reading[0]
            budget -= self._read_chunk(oldest, (budget + 1) // 2, events)
        while budget and self._reading:
            task = min(self._reading, key=lambda one: one.left)
            budget -= self._read_chunk(task, budget, events)

    def _read_chunk(self, task: Task, budget: int, events: list[Event]) -> int:
        """Read up to `budget` tokens of the prompt; how many. After the last one the answer begins."""
        lane, start = task.reading, task.fed
        assert lane is not None
        chunk = task.prompt[start : start + budget]
        try:
            logits = self._slots.feed(lane.slot, chunk, last=not task.scores_prompt)
            task.fed += len(chunk)
            self._prompt_tokens += len(chunk)
            if task.scores_prompt:
                score_prompt(task, start, logits)
            if not task.left:
                self._reading.remove(task)
                task.reading = None
                self._start(task, lane, logits[-1:], events)
        except Exception as error:  # as in `_decode`
            self._answers.fail(task, error, events)
        return len(chunk)

    def _start(self, task: Task, lane: Lane, logits: np.ndarray, events: list[Event]) -> None:
        """The prompt has been read into the lane's slot: choose the first token from `logits (1, V)`."""
        if task.search is not None:
            lane.shares = True
            task.beams = [lane]
            self._answers.search(task, logits, events)
            return
        if task.pending:
            task.logits = logits.copy()
        self._answers.draw([lane], logits, events)
        self._draw_more(task)
        self._admit(events)

    def _fork(self, task: Task, events: list[Event]) -> None:
        """One more draw of a prompt that has been read goes on from a copy of its keys and values."""
        if task.pending:
            lane = task.pending[0]
            if task.logits is None or self._slots.match(task.prompt, task.adapter).max() < len(task.prompt):
                self._forking.discard(task)
                self._begin(task, lane)  # nobody read it, or the last one that held the prompt is overwritten
                return
            self._allocation.place(lane, task.prompt)
            self._answers.draw([lane], task.logits, events)
        self._forking.discard(task)
        if task.pending:
            self._draw_more(task)
        else:
            task.logits = None
