"""Beams among the rows of an engine, on a model so flat that they change places at nearly every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import trained
from traffic import assert_empty, engine_of

from llmctl.engine import EngineOptions, Event, Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator
from llmctl.ort.slots import Slots


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_that_change_places_advance_once_a_step(generator: OrtGenerator, beams: int) -> None:
    random = np.random.default_rng(beams)
    engine = generator.engine(EngineOptions(slots=8, context=64))
    sampling = Sampling(max_new_tokens=12, beams=beams, n=2, logit_bias=((1, 1.0),))
    ended = 0
    prompts = [random.integers(3, 97, 6 + i).tolist() for i in range(6)]
    for number, prompt in enumerate(prompts):
        other = engine.submit(Request(prompt=prompt[::-1], sampling=Sampling(max_new_tokens=30)))
        ticket = engine.submit(Request(prompt=prompt, sampling=sampling, logprobs=1))
        events = {}
        while len(events) < 2:
            events |= {event.choice: event for event in engine.step() if event.ticket == ticket}
        expected = generator.candidates(prompt, sampling)
        for choice, candidate in enumerate(expected):
            assert list(events[choice].tokens) == candidate.ids, number
            told = [score.logprob for score in events[choice].scores]  # that of the end among them
            assert np.allclose(told, candidate.logprobs, atol=1e-4)
        ended += sum(candidate.ended for candidate in expected)
        engine.cancel(other)
    assert ended  # else no score of an end was compared
    engine.close()


def answers(engine, request: Request) -> list[Event]:
    """The last event of each answer, in their order."""
    ticket = engine.submit(request)
    found = {}
    while engine.busy:
        found |= {event.choice: event for event in engine.step() if event.ticket == ticket and event.admitted is None}
    return [found[choice] for choice in sorted(found)]


@pytest.mark.parametrize("count", [0, 3])
def test_scores_are_kept_as_beams_grow_and_nothing_is_read_again(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    fed: list[int] = []
    feed = Slots.feed
    monkeypatch.setattr(Slots, "feed", lambda s, slot, ids, **how: (fed.append(len(ids)), feed(s, slot, ids, **how))[1])
    engine = engine_of(trained_generator, slots=8, prefill_tokens=8)
    prompt = trained.sentence(np.random.default_rng(0), 10)
    long = Sampling(max_new_tokens=100, logit_bias=((trained.EOS, -100.0),))
    engine.submit(Request(prompt=prompt, sampling=long))
    beams = Sampling(max_new_tokens=60, beams=7, n=7, logit_bias=((trained.EOS, -3.0),))
    ticket = engine.submit(Request(prompt=prompt, sampling=beams, logprobs=count))
    found: list[Event] = []
    while engine.busy:
        fed.clear()
        found += [event for event in engine.step() if event.ticket == ticket and event.tokens]
        assert sum(fed) <= 8, "no step reads more than the budget"
    assert len(found) == 7
    for event in found:
        said = [score.token for score in event.scores]
        assert said[: len(event.tokens)] == list(event.tokens)
        assert said[len(event.tokens) :] == [trained.EOS] * (event.finish_reason == "stop")
        likely = trained_generator.answer_logits(prompt, said).astype(np.float64)
        likely -= np.log(np.exp(likely).sum(axis=1, keepdims=True))
        assert np.allclose([one.logprob for one in event.scores], likely[np.arange(len(said)), said], atol=1e-4)
        for one, row in zip(event.scores, likely, strict=True):
            assert len(one.top) == count
            assert np.allclose([value for _, value in one.top], np.sort(row)[::-1][:count], atol=1e-4)
            assert np.allclose([value for _, value in one.top], [row[token] for token, _ in one.top], atol=1e-4)
    assert_empty(engine)
    engine.close()


class Paths:
    """A constraint: one of these sequences. One that does not end with an EOS id leads to where nothing is allowed."""

    def __init__(self, paths: Sequence[tuple[int, ...]], said: tuple[int, ...] = ()) -> None:
        self.paths, self.said = paths, said

    def mask(self) -> np.ndarray:
        allowed, at = np.zeros(trained.VOCABULARY, bool), len(self.said)
        allowed[[path[at] for path in self.paths if path[:at] == self.said and len(path) > at]] = True
        return allowed

    def accept(self, token: int) -> None:
        self.said = (*self.said, token)

    def copy(self) -> Paths:
        return Paths(self.paths, self.said)


@pytest.mark.parametrize("count", [0, 2])
def test_the_end_that_is_scored_is_the_one_that_ended_the_beam(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    ends = [7, 8, 9, 500]  # some models list an id that is outside the vocabulary
    monkeypatch.setattr(trained_generator, "eos_ids", frozenset(ends))
    engine = engine_of(trained_generator, slots=2)
    for end in ends[:3]:
        form = Paths([(30, 31, end), (40, end)])
        sampling = Sampling(max_new_tokens=5, beams=2, n=2)
        found = answers(engine, Request(prompt=[5, 9], sampling=sampling, constraint=form, logprobs=count))
        expected = trained_generator.candidates([5, 9], sampling, form)
        assert sorted(event.tokens for event in found) == [(30, 31), (40,)]
        for event, one in zip(found, expected, strict=True):
            assert event.scores[-1].token == one.end == end
            assert [score.logprob for score in event.scores] == pytest.approx(one.logprobs, abs=1e-4)
    assert_empty(engine)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([(30,), (40, 41, 42, 1)], [[40, 41, 42]]),  # of two beams one cannot go on
        ([(30,), (31,), (40, 41, 1), (40, 42, 1)], [[40, 41], [40, 42]]),  # and its place is taken
        ([(30, 1), (40,)], [[30]]),  # one has ended when the other cannot go on
    ],
)
def test_a_beam_that_cannot_go_on_leaves_the_others(
    trained_generator: OrtGenerator, paths: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    engine = engine_of(trained_generator, slots=3)
    sampling = Sampling(max_new_tokens=8, beams=3, n=3)
    found = answers(engine, Request(prompt=[5, 9], sampling=sampling, constraint=Paths(paths)))
    assert [event.error for event in found] == [None] * 3
    assert sorted(list(event.tokens) for event in found if event.tokens) == expected
    assert_empty(engine)


def test_a_search_of_which_no_beam_can_go_on_has_failed(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=3)
    request = Request(prompt=[5, 9], sampling=Sampling(beams=2), constraint=Paths([(30, 31), (40, 41)]))
    other = engine.submit(Request(prompt=[5, 9], sampling=Sampling(max_new_tokens=9)))
    ticket, events = engine.submit(request), []
    while engine.busy:
        events += engine.step()
    assert [str(event.error) for event in events if event.error] == [
        "no beam can go on: the constraint allows no token, or the logits are not numbers"
    ]
    assert [event.ticket for event in events if event.error] == [ticket]
    said = [token for event in events if event.ticket == other for token in event.tokens]
    assert said == list(trained_generator.stream([5, 9], Sampling(max_new_tokens=9)))
    assert_empty(engine)
