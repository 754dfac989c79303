"""An `Engine` over any `Generator`: one request after the other, for models that cannot answer side by side.

Torch models, encoder-decoders and graphs whose cache grows are served by it. Waiting requests of different clients take
turns. The arrays that a generator gives are used by their methods only, so the core stays free of numpy.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from llmctl.engine import EngineOptions, EngineStats, Event, FinishReason, QueueFullError, Request, TokenScores
from llmctl.errors import UsageError
from llmctl.generator import Candidate, choose_adapter

if TYPE_CHECKING:
    from llmctl.generator import Generator, Tokens

OPTIONS = EngineOptions()


class OneByOne:
    """Answers the requests of a queue in turn, each with the generator's own `stream` or `candidates`.

    A draw of one answer advances a token with every step. Several answers, beams, and scored answers need the whole
    run: their tokens come at once when it is over. There is one slot, no prefix cache, and no speculation.
    """

    def __init__(self, generator: Generator, options: EngineOptions = OPTIONS) -> None:
        if options.speculation != "none":
            raise UsageError(
                f"speculation is {options.speculation}, but this model answers one request after the other",
                hint="set speculation to none, or export the model with `llmctl export-onnx`",
            )
        self._generator, self._max_queue = generator, options.max_queue
        self._answering = generator
        """With the adapter of the request that runs."""
        whole = generator.context_length
        self.context_length = min(options.context or whole, whole)
        self.vocab_size, self.eos_ids, self.backend = generator.vocab_size, generator.eos_ids, generator.backend
        self._tickets = itertools.count(1)
        self._waiting: OrderedDict[str, deque[tuple[int, Request]]] = OrderedDict()
        self._ticket = 0
        self._running: Iterator[list[Event]] | None = None
        self._said_end: int | None = None
        """The EOS id that the draw ended with, if the model tells."""
        self._wanted: dict[int, set[int]] = {}
        """Ticket -> the choices that somebody still waits for."""
        self._steps = self._prompt_tokens = self._generated = 0

    def submit(self, request: Request) -> int:
        """Queue a request; see `Engine.submit`."""
        choose_adapter(self._generator, request.adapter)
        room = self._room(request)
        if room < 1:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens, the context is {self.context_length}",
                hint="shorten the prompt or raise `context`",
            )
        waiting = sum(map(len, self._waiting.values()))
        if waiting >= self._max_queue:
            raise QueueFullError(f"{waiting} requests are waiting already", hint="try again later")
        ticket = next(self._tickets)
        sampling = replace(request.sampling, max_new_tokens=room)
        self._waiting.setdefault(request.client, deque()).append((ticket, replace(request, sampling=sampling)))
        self._wanted[ticket] = set(range(sampling.n))
        return ticket

    def _room(self, request: Request) -> int:
        """Most tokens of the answer."""
        room = self._generator.room(request.prompt)
        if not self._generator.encoder_decoder:
            room = min(room, self.context_length - len(request.prompt))
        else:
            room = min(room, self.context_length)
        return min(room, request.sampling.max_new_tokens)

    def at_once(self, request: Request) -> bool:
        """See `Engine.at_once`: those of one unscored draw alone come as they are drawn."""
        return request.sampling.n > 1 or request.sampling.beams > 1 or request.logprobs is not None

    def cancel(self, ticket: int, choice: int | None = None) -> None:
        """Give up an answer, or the request; see `Engine.cancel`."""
        wanted = self._wanted.get(ticket, set())
        wanted -= wanted.copy() if choice is None else {choice}
        if wanted:
            return
        if ticket == self._ticket and self._running is not None:
            self._end()
        elif self._wanted.pop(ticket, None) is not None:
            self._waiting = OrderedDict(
                (client, left)
                for client, queue in self._waiting.items()
                if (left := deque(one for one in queue if one[0] != ticket))
            )

    def step(self) -> list[Event]:
        """One token of the running answer, or the beginning of the next request; see `Engine.step`."""
        if self._running is None:  # said before the work begins, which may take as long as the whole answer
            return [Event(self._ticket, admitted=time.perf_counter())] if self._begin() else []
        self._steps += 1
        try:
            events = next(self._running)
        except StopIteration:
            self._end()
            return []
        except Exception as error:  # whatever a model raises ends its request and no other
            ticket = self._ticket
            self._end()
            return [Event(ticket, error=error)]
        self._generated += sum(len(event.tokens) for event in events)
        return [event for event in events if event.choice in self._wanted[self._ticket]]

    def _begin(self) -> bool:
        """Take the next request, of the client whose turn it is; False if none waits."""
        if not self._waiting:
            return False
        client, queue = self._waiting.popitem(last=False)
        self._ticket, request = queue.popleft()
        if queue:
            self._waiting[client] = queue  # at the end: the others come first
        self._prompt_tokens += len(request.prompt)
        self._answering = choose_adapter(self._generator, request.adapter)
        self._running = self._answers(self._ticket, request)
        return True

    def _end(self) -> None:
        self._wanted.pop(self._ticket, None)
        running, self._running, self._ticket = self._running, None, 0
        if running is not None:
            running.close()  # type: ignore[attr-defined]  # a generator: ends the model's own stream

    def _answers(self, ticket: int, request: Request) -> Iterator[list[Event]]:
        prompt_scores = self._prompt_scores(request)
        if prompt_scores is not None:
            yield [Event(ticket, prompt_scores=prompt_scores)]
        if request.sampling.n > 1 or request.sampling.beams > 1:
            yield self._candidates(ticket, request)
        elif request.logprobs is not None:
            yield from self._scored(ticket, request)
        else:
            yield from self._streamed(ticket, request)

    def _tokens(self, request: Request) -> Iterator[int]:
        guide = {} if request.constraint is None else {"constraint": request.constraint}
        stream = self._answering.stream(request.prompt, request.sampling, **guide)
        self._said_end = yield from cast("Tokens", stream)  # any other iterator returns None

    def _streamed(self, ticket: int, request: Request) -> Iterator[list[Event]]:
        limit, count = request.sampling.max_new_tokens, 0
        tokens = self._tokens(request)
        try:
            for token in tokens:
                count += 1
                if count == limit:
                    yield [Event(ticket, tokens=(token,), finish_reason="length")]
                    return
                yield [Event(ticket, tokens=(token,))]
            yield [Event(ticket, finish_reason="length" if request.sampling.cuts(count, limit) else "stop")]
        finally:
            tokens.close()  # type: ignore[attr-defined]  # as in `_end`

    def _scored(self, ticket: int, request: Request) -> Iterator[list[Event]]:
        """One draw, scored by one more pass over it when it is complete."""
        ids: list[int] = []
        reason: FinishReason = "stop"
        for events in self._streamed(ticket, request):
            ids += (token for event in events for token in event.tokens)
            reason = events[-1].finish_reason or reason
            if events[-1].finish_reason is None:
                yield []
        ended = len(ids) < request.sampling.max_new_tokens
        scores = self._scores(request, ids, ended, self._said_end)
        yield [Event(ticket, tokens=tuple(ids), scores=scores, finish_reason=reason)]

    def _candidates(self, ticket: int, request: Request) -> list[Event]:
        guide = {} if request.constraint is None else {"constraint": request.constraint}
        found: Sequence[Candidate] = self._answering.candidates(
            request.prompt,
            request.sampling,
            **guide,
        )
        events = []
        for choice, one in enumerate(found):
            scores = () if request.logprobs is None else self._scores(request, one.ids, one.ended, one.end)
            cut = not one.ended or request.sampling.cuts(len(one.ids), request.sampling.max_new_tokens)
            reason: FinishReason = "length" if cut else "stop"
            events.append(Event(ticket, choice, tuple(one.ids), scores, finish_reason=reason))
        # Fewer beams come back where fewer answers exist; those who wait for the others are told that it is over.
        missing = range(len(found), request.sampling.n)
        return events + [Event(ticket, choice, finish_reason="stop") for choice in missing]

    def _scores(self, request: Request, ids: Sequence[int], ended: bool, end: int | None) -> tuple[TokenScores, ...]:
        """Of the tokens of an answer, and where it `ended` of `end`: of the likeliest EOS id if that is unknown."""
        unknown = ended and end is None and bool(self.eos_ids)
        last = min(self.eos_ids) if unknown else end
        ids = [*ids, last] if ended and last is not None else list(ids)
        if not ids:
            return ()
        logits = self._answering.answer_logits(request.prompt, ids)
        if unknown:
            ids[-1] = max(self.eos_ids, key=lambda token: float(logits[-1][token]))
        return tuple(score(row, token, request.logprobs or 0) for row, token in zip(logits, ids, strict=True))

    def _prompt_scores(self, request: Request) -> tuple[TokenScores | None, ...] | None:
        if request.prompt_logprobs is None:
            return None
        prompt = list(request.prompt)
        if not request.prompt_logprobs and len(prompt) > 1:
            found = self._answering.logprobs(prompt).tolist()
            return (None, *(TokenScores(token, value) for token, value in zip(prompt[1:], found, strict=True)))
        logits = self._answering.logits(prompt)[:-1]
        top = request.prompt_logprobs
        return (None, *(score(row, token, top) for row, token in zip(logits, prompt[1:], strict=True)))

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self._running is not None or bool(self._waiting)

    def stats(self) -> EngineStats:
        """Counts and state."""
        return EngineStats(
            waiting=sum(map(len, self._waiting.values())),
            running=int(self._running is not None),
            slots=1,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
        )

    def close(self) -> None:
        """Cancel what is unfinished."""
        self._waiting.clear()
        self._wanted.clear()
        self._end()


def score(logits: Any, token: int, top: int) -> TokenScores:
    """Natural log-probability of `token` under `logits (V,)`, and the `top` likeliest ids with theirs, best first."""
    wide = logits.astype("float64")
    wide = wide - wide.max()
    wide = wide - math.log(float((math.e**wide).sum()))
    best: list[int] = []
    if top:
        chosen = (-wide).argpartition(min(top, len(wide)) - 1)[:top]
        best = sorted((int(i) for i in chosen), key=lambda i: (-float(wide[i]), i))
    return TokenScores(token, float(wide[token]), tuple((i, float(wide[i])) for i in best))
