"""The engine that answers in turn, over a model whose arithmetic is known: turns, queue, departures, scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from llmctl.engine import EngineOptions, Event, QueueFullError, Request
from llmctl.errors import UsageError
from llmctl.generator import Candidate, Sampling
from llmctl.one_by_one import OneByOne, score

VOCAB, END = 50, 1


class Counter:
    """Says the number after the last one of the prompt, the next, and so on; ends at 40. Its logits favour that."""

    backend, eos_ids, encoder_decoder = "counter", frozenset({END}), False
    vocab_size, context_length = VOCAB, 64

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.closed = 0

    def room(self, prompt: Sequence[int]) -> int:
        return self.context_length - len(prompt)

    def after(self, token: int) -> int:
        return token + 1 if token < 39 else END

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        self.begun.append(prompt[0])
        token = prompt[-1]
        try:
            for _ in range(sampling.max_new_tokens):
                token = self.after(token)
                if token == END:
                    return
                yield token
        finally:
            self.closed += 1

    def candidates(self, prompt: Sequence[int], sampling: Sampling) -> list[Candidate]:
        return [
            Candidate(ids, [0.0] * len(ids), len(ids) < sampling.max_new_tokens)
            for ids in ([i + 10, *self.stream(prompt, sampling)] for i in range(sampling.n))
        ]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        rows = np.zeros((len(tokens), VOCAB), np.float32)
        rows[np.arange(len(tokens)), [self.after(token) for token in tokens]] = 3.0
        return rows

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        return self.logits([*prompt, *answer])[len(prompt) - 1 : -1]

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        rows = self.logits(tokens)[:-1].astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        return np.take_along_axis(rows, np.array(tokens[1:])[:, None], axis=1)[:, 0]


LIKELY = 3 - math.log(math.e**3 + VOCAB - 1)
"""Log-probability of the number that follows."""


def asked(*prompt: int, client: str = "", tokens: int = 3, n: int = 1, **more: object) -> Request:
    return Request(
        prompt=prompt, sampling=Sampling(max_new_tokens=tokens, n=n, temperature=float(n > 1)), client=client, **more
    )


def run(engine: OneByOne) -> list[Event]:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def said(events: Sequence[Event], ticket: int, choice: int = 0) -> list[int]:
    return [t for event in events if (event.ticket, event.choice) == (ticket, choice) for t in event.tokens]


def reasons(events: Sequence[Event], ticket: int) -> list[str | None]:
    return [event.finish_reason for event in events if event.ticket == ticket and event.finish_reason]


def test_answers_end_by_length_by_eos_and_at_the_end_of_the_context() -> None:
    engine = OneByOne(Counter(), EngineOptions(context=8))
    tickets = [engine.submit(request) for request in (asked(5), asked(38), asked(2, 3, 4, tokens=60))]
    events = run(engine)
    assert [said(events, ticket) for ticket in tickets] == [[6, 7, 8], [39], [5, 6, 7, 8, 9]]
    assert [reasons(events, ticket) for ticket in tickets] == [["length"], ["stop"], ["length"]]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.running, stats.waiting) == (5, 9, 0, 0)
    with pytest.raises(UsageError, match="the prompt has 8 tokens, the context is 8"):
        engine.submit(asked(*range(2, 10)))


def test_clients_take_turns_whatever_one_of_them_has_sent() -> None:
    model = Counter()
    engine = OneByOne(model, EngineOptions())
    for first in (2, 3, 4, 5):
        engine.submit(asked(first, client="greedy"))
    engine.submit(asked(20, client="b"))
    engine.submit(asked(30, client="c"))
    engine.submit(asked(21, client="b"))
    run(engine)
    assert model.begun == [2, 20, 30, 3, 21, 4, 5]


def test_admission_is_told_first_and_once() -> None:
    engine = OneByOne(Counter(), EngineOptions())
    tickets = [engine.submit(asked(5)), engine.submit(asked(6, n=2)), engine.submit(asked(39))]
    events = run(engine)
    for ticket in tickets:
        first, *others = [event for event in events if event.ticket == ticket]
        assert first == Event(ticket, admitted=first.admitted) and first.admitted is not None
        assert all(event.admitted is None for event in others) and others
    times = [event.admitted for event in events if event.admitted is not None]
    assert times == sorted(times) and len(times) == 3


def test_the_queue_is_bounded_and_a_refusal_takes_nothing() -> None:
    engine = OneByOne(Counter(), EngineOptions(max_queue=2))
    first = engine.submit(asked(5))
    engine.step()  # it runs, and waits no more
    more = [engine.submit(asked(6)), engine.submit(asked(7))]
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        engine.submit(asked(8))
    assert engine.stats().waiting == 2
    events = run(engine)
    assert {event.ticket for event in events} == {first, *more}
    assert engine.submit(asked(8)) not in (first, *more)


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_no_event_comes_of_what_is_cancelled(when: str) -> None:
    model = Counter()
    engine = OneByOne(model, EngineOptions())
    first, second = engine.submit(asked(5, tokens=30)), engine.submit(asked(20))
    gone, stays = (second, first) if when == "waiting" else (first, second)
    engine.step()
    engine.cancel(gone)
    engine.cancel(gone)  # harmless
    events = run(engine)
    assert {event.ticket for event in events} == {stays}
    assert reasons(events, stays) == ["length"]
    assert model.closed == len(model.begun), "the model's own streams are ended too"


def test_several_answers_come_with_their_own_numbers_and_one_can_be_given_up() -> None:
    engine = OneByOne(Counter(), EngineOptions())
    ticket = engine.submit(asked(5, n=3))
    engine.cancel(ticket, 1)
    events = run(engine)
    assert [said(events, ticket, choice) for choice in range(3)] == [[10, 6, 7, 8], [], [12, 6, 7, 8]]
    other = engine.submit(asked(5, n=2))
    engine.cancel(other, 0)
    engine.cancel(other, 1)
    assert not engine.busy
    assert run(engine) == []


def test_scores_are_the_models_own_and_an_end_is_scored_too() -> None:
    engine = OneByOne(Counter(), EngineOptions())
    ticket = engine.submit(asked(37, logprobs=2, prompt_logprobs=0))
    events = run(engine)
    (scored,) = [event for event in events if event.tokens]
    assert scored.tokens == (38, 39)
    assert [one.token for one in scored.scores] == [38, 39, END]
    assert [one.logprob for one in scored.scores] == pytest.approx([LIKELY] * 3)
    for one in scored.scores:
        assert one.top[0] == (one.token, pytest.approx(LIKELY))
        assert one.top[1] == (0 if one.token else 1, pytest.approx(LIKELY - 3))
    assert scored.finish_reason == "stop"
    assert [event.prompt_scores for event in events if event.prompt_scores] == [(None,)]
    ticket = engine.submit(asked(5, 6, 9, prompt_logprobs=1))
    (prompt,) = [event.prompt_scores for event in run(engine) if event.ticket == ticket and event.prompt_scores]
    assert prompt[0] is None
    assert [one.logprob for one in prompt[1:]] == pytest.approx([LIKELY, LIKELY - 3])
    assert [one.top[0][0] for one in prompt[1:]] == [6, 7]


class TwoEnds(Counter):
    """Ends with 0, which is less likely than its other EOS id."""

    eos_ids = frozenset({0, END})

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        yield from super().stream(prompt, sampling)
        return 0

    def candidates(self, prompt: Sequence[int], sampling: Sampling) -> list[Candidate]:
        return [replace(one, end=0) for one in super().candidates(prompt, sampling)]


@pytest.mark.parametrize("n", [1, 2])
def test_the_end_that_is_scored_is_the_one_that_ended_the_answer(n: int) -> None:
    for model, end, likely in ((TwoEnds(), 0, LIKELY - 3), (Counter(), END, LIKELY)):
        engine = OneByOne(model, EngineOptions())
        ticket = engine.submit(asked(37, n=n, tokens=9, logprobs=0))
        scored = [event.scores[-1] for event in run(engine) if event.ticket == ticket and event.tokens]
        assert [(one.token, one.logprob) for one in scored] == [(end, pytest.approx(likely))] * n


def test_a_score_equals_the_closed_form() -> None:
    logits = np.random.default_rng(0).normal(0, 5, VOCAB).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()
    found = score(logits, 7, 4)
    assert found.logprob == pytest.approx(expected[7], abs=1e-12)
    assert [token for token, _ in found.top] == np.argsort(-expected)[:4].tolist()
    assert len(score(logits, 7, VOCAB).top) == VOCAB


def test_a_failure_ends_its_request_and_no_other() -> None:
    model = Counter()
    good = model.after
    model.after = lambda token: good(token) if token != 6 else 1 // 0  # type: ignore[method-assign]
    engine = OneByOne(model, EngineOptions())
    bad, fine = engine.submit(asked(5)), engine.submit(asked(20))
    events = run(engine)
    own = [event for event in events if event.ticket == bad and event.admitted is None]
    assert [type(event.error) for event in own] == [type(None), ZeroDivisionError]
    assert said(events, fine) == [21, 22, 23]


def test_closing_cancels_everything_and_speculation_is_refused() -> None:
    model = Counter()
    engine = OneByOne(model, EngineOptions())
    engine.submit(asked(5))
    engine.submit(asked(6))
    engine.step()  # takes it
    engine.step()
    engine.close()
    assert not engine.busy
    assert engine.step() == []
    assert model.closed == 1
    with pytest.raises(UsageError, match="answers one request after the other"):
        OneByOne(model, EngineOptions(speculation="prompt-lookup"))


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_a_request_for_fewer_than_no_alternatives_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must not be negative, got -1"):
        Request(prompt=[5], sampling=Sampling(), **{name: -1})
