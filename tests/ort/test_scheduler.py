"""The engine for many requests: its answers are those of single runs, whatever else happens beside them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trained
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic import assert_empty, engine_of, finish, mixed_requests, run_traffic

from llmctl.engine import EngineOptions, Event, QueueFullError, Request
from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator, answers
from llmctl.ort.cache_memory import HostMemory
from llmctl.ort.prefixes import PrefixPool
from llmctl.ort.slots import Slots


def test_200_requests_that_join_and_leave_get_the_answers_of_single_runs(trained_generator: OrtGenerator) -> None:
    engine, wrong, close = run_traffic(trained_generator, 200)
    stats = engine.stats()
    assert wrong == 0
    assert close < 0.002 * stats.generated_tokens, f"{close} steps of {stats.generated_tokens} were not judged"
    assert stats.cached_tokens > 1000
    assert stats.generated_tokens > 1500


def test_without_the_prefix_cache_nothing_is_taken_over(trained_generator: OrtGenerator) -> None:
    engine, wrong, _ = run_traffic(trained_generator, 40, prefix_cache=False)
    assert (wrong, engine.stats().cached_tokens, engine.stats().cache_used) == (0, 0, 0)


class _Faults:
    """Ways in which the engine could go wrong."""

    @staticmethod
    def neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
        """Slots change places in the books, but not in memory."""
        monkeypatch.setattr(HostMemory, "exchange", lambda *_: None)

    @staticmethod
    def short_copy(monkeypatch: pytest.MonkeyPatch) -> None:
        """The last token of a copied prefix is missing."""
        copy = HostMemory.copy
        monkeypatch.setattr(HostMemory, "copy", lambda m, a, b, start, stop: copy(m, a, b, start, max(start, stop - 1)))

    @staticmethod
    def stale_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
        """A prefix is believed to be one token longer than it is."""
        match = Slots.match
        monkeypatch.setattr(Slots, "match", lambda s, *a: np.where(m := match(s, *a), np.minimum(m + 1, s.lengths), 0))

    @staticmethod
    def stale_pool(monkeypatch: pytest.MonkeyPatch) -> None:
        """The pool gives another prefix than the one that matched."""
        match = PrefixPool.match

        def wrong(pool, tokens, *adapter):
            prefix, length = match(pool, tokens, *adapter)
            return (next((p for p in pool._kept.values() if len(p.tokens) >= length), prefix), length)

        monkeypatch.setattr(PrefixPool, "match", wrong)

    @staticmethod
    def lengths(monkeypatch: pytest.MonkeyPatch) -> None:
        """Every row is believed as long as the longest: the mask of another row."""
        step = Slots.step

        def wrong(slots, tokens):
            slots.lengths[: len(tokens)] = slots.lengths[: len(tokens)].max()
            return step(slots, tokens)

        monkeypatch.setattr(Slots, "step", wrong)


@pytest.mark.parametrize("fault", ["neighbour", "short_copy", "stale_prefix", "stale_pool", "lengths"])
def test_faults_are_seen(trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    getattr(_Faults, fault)(monkeypatch)
    with pytest.raises(AssertionError):  # what the tests above would say
        _, wrong, _ = run_traffic(trained_generator, 60)
        assert wrong == 0


def test_answers_equal_those_of_transformers(trained_generator: OrtGenerator, trained_dir) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained_dir, dtype=torch.float32).eval()
    requests = list(mixed_requests(6, seed=4))
    engine = engine_of(trained_generator, slots=4, prefill_tokens=10)
    tickets = [engine.submit(request) for request in requests]
    found = finish(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        ids = torch.tensor([request.prompt])
        limit = min(request.sampling.max_new_tokens, trained.CONTEXT - len(request.prompt))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=2
        )
        expected = out[0, len(request.prompt) :].tolist()
        assert found[ticket, 0] == (expected[:-1] if expected[-1] == trained.EOS else expected)


def test_seeds_reproduce_whatever_the_batch(trained_generator: OrtGenerator) -> None:
    requests = [
        Request(
            prompt=request.prompt,
            sampling=Sampling(
                max_new_tokens=15,
                temperature=0.7 + i % 3 / 4,
                top_k=(0, 20)[i % 2],
                top_p=(1.0, 0.9)[i % 3 == 1],
                seed=i,
                n=1 + i % 4,
                frequency_penalty=(0.0, 0.5)[i % 5 == 0],
            ),
        )
        for i, request in enumerate(mixed_requests(40))
    ]
    engine = engine_of(trained_generator, slots=5, prefill_tokens=30)
    tickets = [engine.submit(request) for request in requests]
    found = finish(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        for choice, single in enumerate(request.sampling.draws()):
            assert found[ticket, choice] == list(trained_generator.stream(request.prompt, single))
    assert_empty(engine)


def test_more_draws_than_slots_share_one_prefill(trained_generator: OrtGenerator) -> None:
    prompt = trained.sentence(np.random.default_rng(3), 30)
    sampling = Sampling(max_new_tokens=10, temperature=1.0, seed=5, n=7)
    engine = engine_of(trained_generator, slots=3, prefix_cache=False)
    ticket = engine.submit(Request(prompt=prompt, sampling=sampling))
    found = finish(engine)
    expected = [candidate.ids for candidate in trained_generator.candidates(prompt, sampling)]
    assert [found[ticket, choice] for choice in range(7)] == expected
    assert engine.stats().prompt_tokens == 30
    assert_empty(engine)


def test_beams_equal_those_of_a_search_alone_and_delay_nobody(trained_generator: OrtGenerator) -> None:
    random = np.random.default_rng(9)
    beams = Request(prompt=trained.sentence(random, 20), sampling=Sampling(max_new_tokens=20, beams=4, n=3), logprobs=2)
    others = [Request(prompt=trained.sentence(random, 9), sampling=Sampling(max_new_tokens=25)) for _ in range(3)]
    engine = engine_of(trained_generator, slots=6)
    tickets = [engine.submit(request) for request in [others[0], beams, *others[1:]]]
    steps: dict[int, list[int]] = defaultdict(list)
    events: list[Event] = []
    while engine.busy:
        for event in engine.step():
            steps[event.ticket].append(engine.stats().steps)
            events.append(event)
    for ticket in (tickets[0], tickets[2]):
        assert np.diff(steps[ticket]).max(initial=1) == 1, "a token with every step while the search runs"
    expected = trained_generator.candidates(beams.prompt, beams.sampling)
    found = {event.choice: event for event in events if event.ticket == tickets[1]}
    for choice, candidate in enumerate(expected):
        assert list(found[choice].tokens) == candidate.ids
        ends = [score.token for score in found[choice].scores[len(candidate.ids) :]]
        assert [score.token for score in found[choice].scores] == candidate.ids + ends
        assert set(ends) <= trained_generator.eos_ids
        scored = [score.logprob for score in found[choice].scores]
        assert np.allclose(scored, candidate.logprobs, atol=1e-4)
    assert_empty(engine)


def test_beams_that_share_slots_with_traffic(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=6, prefill_tokens=16, max_queue=99)
    wanted = {}
    for i, request in enumerate(mixed_requests(30, seed=8)):
        sampling = Sampling(max_new_tokens=12, beams=2 + i % 3, n=2) if i % 3 == 0 else request.sampling
        wanted[engine.submit(Request(prompt=request.prompt, sampling=sampling))] = (request.prompt, sampling)
    found = finish(engine)
    for ticket, (prompt, sampling) in wanted.items():
        if sampling.beams > 1:
            expected = [candidate.ids for candidate in trained_generator.candidates(prompt, sampling)]
            assert [found[ticket, choice] for choice in range(2)] == expected
    assert_empty(engine)


def test_a_long_prompt_is_read_under_the_budget(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    feed = Slots.feed
    monkeypatch.setattr(Slots, "feed", lambda s, slot, ids, **how: (fed.append(len(ids)), feed(s, slot, ids, **how))[1])
    random = np.random.default_rng(2)
    engine = engine_of(trained_generator, slots=4, prefill_tokens=16)
    talker = engine.submit(Request(prompt=[5, 9], sampling=Sampling(max_new_tokens=100, temperature=1.0, seed=1)))
    engine.step()
    long = engine.submit(Request(prompt=trained.sentence(random, 100), sampling=Sampling(max_new_tokens=2)))
    short = engine.submit(Request(prompt=trained.sentence(random, 6), sampling=Sampling(max_new_tokens=2)))
    first: dict[int, int] = {}
    for step in range(20):
        fed.clear()
        tickets = [event.ticket for event in engine.step() if event.admitted is None]
        assert sum(fed) <= 16
        assert tickets.count(talker) == 1, "whoever runs gets a token with every step"
        for ticket in tickets:
            first.setdefault(ticket, step)
    assert first[short] == 0, "a short prompt does not wait for a long one"
    assert first[long] == 6, "100 + 6 tokens take 7 steps of 16"


def test_clients_take_turns(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=1)
    greedy = Sampling(max_new_tokens=1)
    order = [("many", [5 + i]) for i in range(6)] + [("one", [50]), ("other", [60]), ("one", [51])]
    names = {
        engine.submit(Request(prompt=prompt, sampling=greedy, client=client)): f"{client} {prompt[0]}"
        for client, prompt in order
    }
    ended = []
    while engine.busy:
        ended += [names[event.ticket] for event in engine.step() if event.finish_reason]
    assert ended == ["many 5", "one 50", "other 60", "many 6", "one 51", "many 7", "many 8", "many 9", "many 10"]


def test_a_full_queue_refuses(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=2, max_queue=1)
    request = Request(prompt=[5, 6], sampling=Sampling(max_new_tokens=30, temperature=1.0, seed=3))
    for _ in range(3):
        engine.submit(request)
    with pytest.raises(QueueFullError):
        engine.submit(request)
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 1)
    with pytest.raises(QueueFullError):
        engine.submit(request)
    engine.cancel(0)
    engine.step()
    engine.submit(request)
    engine.close()


def test_a_conversation_is_read_once(trained_generator: OrtGenerator) -> None:
    random = np.random.default_rng(11)
    engine = engine_of(trained_generator, slots=2)
    text: list[int] = []
    cached = []
    for _ in range(3):
        text += trained.sentence(random, 15)
        engine.submit(Request(prompt=text, sampling=Sampling(max_new_tokens=8)))
        events = []
        while engine.busy:
            events += [event for event in engine.step() if event.admitted is None]
        cached.append(events[0].cached)
        said = [token for event in events for token in event.tokens]
        # The last token of an answer that ended at its limit was never fed.
        fed = len(text) + len(said) - (events[-1].finish_reason == "length")
        text += said
        assert int(engine._slots.match(np.array(text, np.int32)).max()) == fed
    assert cached[0] == 0
    assert cached[1] >= 15
    assert cached[2] >= 30
    assert engine.stats().cached_tokens == sum(cached)


def test_sequences_that_lost_their_slot_come_back_from_the_pool(trained_generator: OrtGenerator) -> None:
    random = np.random.default_rng(12)
    prompts = [[10 + i, *trained.sentence(random, 39)] for i in range(3)]
    engine = engine_of(trained_generator, slots=1)
    cached = []
    for prompt in [*prompts, prompts[2], prompts[1]]:
        engine.submit(Request(prompt=[*prompt, 20], sampling=Sampling(max_new_tokens=2)))
        events = []
        while engine.busy:
            events += [event for event in engine.step() if event.admitted is None]
        cached.append(events[0].cached)
    # The pool holds 64 tokens, which is one of these sequences; the first one was evicted.
    assert cached == [0, 0, 0, 40, 40]
    assert engine.stats().evictions >= 1
    assert engine.stats().cache_used <= engine.stats().cache_capacity == 128 + 64


def test_prompt_scores_are_those_of_the_model_even_if_its_keys_are_known(trained_generator: OrtGenerator) -> None:
    from scipy.special import log_softmax

    prompt = trained.sentence(np.random.default_rng(13), 40)
    engine = engine_of(trained_generator, slots=2, prefill_tokens=7)
    engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=1)))
    finish(engine)
    engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=3), prompt_logprobs=2, logprobs=0))
    events = []
    while engine.busy:
        events += [event for event in engine.step() if event.admitted is None]
    likely = log_softmax(trained_generator.logits(prompt).astype(np.float64), axis=1)
    scored = events[0].prompt_scores
    assert scored is not None
    assert (scored[0], len(scored), events[0].cached) == (None, 40, 0)
    for i, score in enumerate(scored[1:]):
        assert score is not None
        assert score.token == prompt[i + 1]
        assert abs(score.logprob - likely[i, prompt[i + 1]]) < 1e-4
        assert [token for token, _ in score.top] == np.argsort(-likely[i])[:2].tolist()
    assert all(event.prompt_scores is None for event in events[1:])
    assert all(len(event.scores) == len(event.tokens) and not event.scores[0].top for event in events if event.tokens)


class _Only:
    """A constraint: these tokens in this order, then EOS; it fails where told to."""

    def __init__(self, tokens: Sequence[int], fails: bool = False) -> None:
        self.tokens, self.at, self.fails = list(tokens), 0, fails

    def mask(self) -> np.ndarray:
        if self.fails and self.at == 2:
            raise RuntimeError("the grammar is broken")
        allowed = np.zeros(trained.VOCABULARY, bool)
        allowed[self.tokens[self.at] if self.at < len(self.tokens) else trained.EOS] = True
        return allowed

    def accept(self, token: int) -> None:
        assert self.mask()[token]
        self.at += 1

    def copy(self) -> _Only:
        return _Only(self.tokens, self.fails)


def test_a_constraint_that_fails_ends_its_own_request_only(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=3)
    sampling = Sampling(max_new_tokens=10)
    good = engine.submit(Request(prompt=[5, 9], sampling=sampling, constraint=_Only([30, 31, 32])))
    bad = engine.submit(Request(prompt=[5, 9], sampling=sampling, constraint=_Only([30, 31, 32], fails=True)))
    free = engine.submit(Request(prompt=[5, 9], sampling=sampling))
    found, errors = defaultdict(list), {}
    while engine.busy:
        for event in engine.step():
            found[event.ticket] += event.tokens
            if event.error is not None:
                errors[event.ticket] = str(event.error)
    assert found[good] == [30, 31, 32]
    assert (found[bad], errors) == ([30, 31], {bad: "the grammar is broken"})
    assert found[free] == list(trained_generator.stream([5, 9], sampling))
    assert_empty(engine)


class _Broken:
    """Random numbers that give out after the second one."""

    def __init__(self) -> None:
        self.left = 2

    def random(self) -> float:
        self.left -= 1
        if self.left < 0:
            raise ValueError("no more random numbers")
        return 0.5


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("fault", ["random", "temperature", "penalty"])
def test_a_sampling_state_that_fails_ends_its_own_request_only(
    trained_generator: OrtGenerator, fault: str, place: int
) -> None:
    """Others keep their random numbers and their counts: each of their answers is that of a run alone."""
    engine = engine_of(trained_generator, slots=6)
    samplings = [
        Sampling(max_new_tokens=12, temperature=1.5, seed=1),
        Sampling(max_new_tokens=12, temperature=1.5, seed=2, repetition_penalty=1.3, presence_penalty=0.4),
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=12, temperature=1.0, seed=3, n=2),
    ]
    tickets = [engine.submit(Request(prompt=[5, 9], sampling=one)) for one in samplings]
    bad = engine.submit(Request(prompt=[5, 9], sampling=replace(samplings[3], n=1), logprobs=1))
    lane = engine._tasks[bad].lanes[0]
    if place < 3:  # among the other rows, not behind them
        engine._waiting.remove("", engine._tasks[bad])
        line = engine._waiting._lines[""]
        line.insert(place, engine._tasks[bad])
        engine._waiting._count += 1
    found, errors = defaultdict(list), {}
    for step in range(100):
        if step == 2:
            if fault == "random":
                lane.state.random = _Broken()
            elif fault == "temperature":
                lane.state.sampling = replace(lane.state.sampling)
                object.__setattr__(lane.state.sampling, "temperature", "warm")
            else:
                lane.state.seen, lane.state.adjusts = "damaged", True
        for event in engine.step():
            found[event.ticket, event.choice] += event.tokens
            if event.error is not None:
                errors[event.ticket] = type(event.error)
    assert list(errors) == [bad] and errors[bad] is not UsageError
    for ticket, sampling in zip(tickets, samplings, strict=True):
        singles = sampling.draws()
        for choice, single in enumerate(singles):
            assert found[ticket, choice] == list(trained_generator.stream([5, 9], single)), (ticket, choice)
    assert_empty(engine)


def test_admission_is_told_once_when_it_happens(trained_generator: OrtGenerator) -> None:
    """With one slot the second waits for the first, and is admitted while the third still waits."""
    engine = engine_of(trained_generator, slots=1, prefill_tokens=4)
    tickets = [
        engine.submit(Request(prompt=[5] * 10, sampling=Sampling(max_new_tokens=3, temperature=1.0, n=n)))
        for n in (1, 2, 1)
    ]
    told: list[Event] = []
    steps: dict[int, tuple[float, float]] = {}
    while engine.busy:
        before = time.perf_counter()
        events = engine.step()
        steps |= {event.ticket: (before, time.perf_counter()) for event in events if event.admitted is not None}
        told += events
    admissions = {event.ticket: event for event in told if event.admitted is not None}
    assert list(admissions) == tickets and sum(event.admitted is not None for event in told) == 3
    for ticket in tickets:
        own = [event for event in told if event.ticket == ticket]
        assert own[0] == Event(ticket, admitted=own[0].admitted), "before all others, and nothing else"
        begun, ended = steps[ticket]
        assert begun <= own[0].admitted <= ended
    second = told.index(admissions[tickets[1]])
    assert [e.finish_reason for e in told[:second] if e.ticket == tickets[0]][-1], "it has ended, as its draws had it"
    assert not [e for e in told[:second] if e.ticket == tickets[2]]


def test_a_session_that_fails_ends_the_running_requests_and_no_others(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(trained_generator, slots=2)
    request = Request(prompt=[5, 9], sampling=Sampling(max_new_tokens=10))
    tickets = [engine.submit(request) for _ in range(3)]
    engine.step()

    def fails(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "step", fails)
        events = engine.step()
    assert [event.ticket for event in events if event.error is not None] == tickets[:2]
    began = {(event.ticket, 0): list(event.tokens) for event in events if event.error is None}
    assert finish(engine, began)[tickets[2], 0] == list(trained_generator.stream([5, 9], request.sampling))
    assert_empty(engine)


def test_memory_that_ends_when_a_token_is_scored_ends_that_request_only(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(trained_generator, slots=4)
    draws = Sampling(max_new_tokens=10, temperature=1.0, seed=3, n=2)
    good = [engine.submit(Request(prompt=[5, 9], sampling=draws, logprobs=2)) for _ in range(2)]
    bad = engine.submit(Request(prompt=[5, 9], sampling=Sampling(max_new_tokens=10), logprobs=2))
    score = answers.score_lanes

    def ends(lanes, *more):
        if any(lane.task.ticket == bad and lane.said == 3 for lane in lanes):
            raise MemoryError("no memory for scores")
        return score(lanes, *more)

    monkeypatch.setattr(answers, "score_lanes", ends)
    found, errors, scored = defaultdict(list), {}, defaultdict(int)
    while engine.busy:
        for event in engine.step():
            found[event.ticket, event.choice] += event.tokens
            scored[event.ticket, event.choice] += len(event.scores)
            if event.error is not None:
                errors[event.ticket] = type(event.error)
    assert errors == {bad: MemoryError} and len(found[bad, 0]) == 3
    for ticket in good:
        for choice, single in enumerate(draws.draws()):
            assert found[ticket, choice] == list(trained_generator.stream([5, 9], single))
            assert scored[ticket, choice] >= len(found[ticket, choice])
    assert_empty(engine)


def test_an_error_while_tokens_are_chosen_ends_who_runs_and_nobody_who_waits(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(trained_generator, slots=1)
    request = Request(prompt=[5, 9], sampling=Sampling(max_new_tokens=6))
    running, waiting = engine.submit(request), engine.submit(request)
    engine.step()

    def fails(*_: object) -> None:
        raise MemoryError("no memory for logits")

    with monkeypatch.context() as patch:
        patch.setattr(answers.Answers, "choose", fails)
        events = engine.step()
    assert {event.ticket: type(event.error) for event in events if event.error} == {running: MemoryError}
    began = {(event.ticket, 0): list(event.tokens) for event in events if event.ticket == waiting and event.tokens}
    assert finish(engine, began)[waiting, 0] == list(trained_generator.stream([5, 9], request.sampling))
    assert_empty(engine)


@pytest.mark.parametrize(
    ("sampling", "moves"),
    [
        ({}, 0),
        ({"n": 2, "temperature": 1.0, "seed": 1}, 0),
        ({"n": 2, "temperature": 1.0, "seed": 1}, 1),
        ({"beams": 2}, 1),
    ],
)
def test_memory_that_ends_when_a_slot_is_taken_ends_that_request_only(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, sampling: dict, moves: int
) -> None:
    """After so many moves of keys and values into the pool there is no memory for another one."""
    engine, random = engine_of(trained_generator, slots=3), np.random.default_rng(4)
    earlier = [Request(prompt=trained.sentence(random, 30), sampling=Sampling(max_new_tokens=20)) for _ in range(3)]
    tickets = [engine.submit(request) for request in earlier]
    finished = finish(engine)
    running = engine.submit(earlier[0])
    said = [token for event in engine.step() for token in event.tokens]
    save, left = engine._slots.memory.save, iter(range(moves))

    def ends(slot: int, stop: int) -> np.ndarray:
        if next(left, None) is None:
            raise MemoryError("no memory for keys and values")
        return save(slot, stop)

    monkeypatch.setattr(engine._slots.memory, "save", ends)
    other = trained.sentence(random, 25)
    bad = engine.submit(Request(prompt=other, sampling=Sampling(max_new_tokens=8, **sampling)))
    errors = {}
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                errors[event.ticket] = type(event.error)
            elif event.ticket == running:
                said += event.tokens
    assert errors == {bad: MemoryError}
    assert said == finished[tickets[0], 0]
    assert_empty(engine)
    monkeypatch.undo()
    again = [engine.submit(request) for request in earlier]
    found = finish(engine)
    assert [found[ticket, 0] for ticket in again] == [finished[ticket, 0] for ticket in tickets]
    assert_empty(engine)
    engine.close()


@pytest.mark.parametrize("how", ["copy", "exchange"])
def test_memory_that_ends_when_slots_are_moved_ends_all_that_hold_one_and_the_engine_goes_on(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The first of three ends, so the last is to take its place."""
    engine = engine_of(trained_generator, slots=3, prefix_cache=how == "exchange")
    prompts = [trained.sentence(np.random.default_rng(seed), 12) for seed in range(3)]
    alone = Sampling(max_new_tokens=8)
    tickets = [
        engine.submit(Request(prompt=prompt, sampling=replace(alone, max_new_tokens=limit)))
        for prompt, limit in zip(prompts, (2, 8, 8), strict=True)
    ]
    ended: set[int] = set()
    while not ended:
        ended = {event.ticket for event in engine.step() if event.finish_reason is not None}
    assert ended == {tickets[0]}

    def ends(*_: object) -> None:
        raise MemoryError("no memory for keys and values")

    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, how, ends)
        events = engine.step()
    assert {event.ticket: type(event.error) for event in events} == dict.fromkeys(tickets[1:], MemoryError)
    again = {engine.submit(Request(prompt=prompt, sampling=alone)): prompt for prompt in prompts}
    found = finish(engine)
    for ticket, prompt in again.items():
        assert found[ticket, 0] == list(trained_generator.stream(prompt, alone))
    assert_empty(engine)
    engine.close()


@settings(max_examples=40)
@given(data=st.data())
def test_no_sequence_of_calls_loses_a_slot_or_crosses_answers(trained_generator: OrtGenerator, data) -> None:
    slots = data.draw(st.integers(1, 4))
    engine = engine_of(
        trained_generator, slots=slots, prefill_tokens=data.draw(st.integers(1, 20)), max_queue=3, context=40,
        prefix_cache=data.draw(st.booleans()),
    )  # fmt: skip
    samplings = [Sampling(max_new_tokens=5), Sampling(max_new_tokens=6, temperature=1.0, seed=3, n=3)]
    samplings += [Sampling(max_new_tokens=4, beams=slots, n=slots)] if slots > 1 else []
    live: dict[int, Request] = {}
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    whole: set[tuple[int, int]] = set()
    gone: set[tuple[int, int]] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "step", "step", "cancel", "cancel choice"]))
        if action == "submit":
            prompt = [5, 9, 20, 21, 22][: data.draw(st.integers(1, 5))] + [data.draw(st.integers(7, 9))] * 4
            request = Request(prompt=prompt, sampling=data.draw(st.sampled_from(samplings)))
            try:
                live[engine.submit(request)] = request
            except QueueFullError:
                assert engine.stats().waiting >= 3
        elif live and action != "step":
            ticket = data.draw(st.sampled_from(sorted(live)))
            choice = data.draw(st.integers(0, 2)) if action == "cancel choice" else None
            engine.cancel(ticket, choice)
            gone |= {(ticket, one) for one in range(9) if choice is None or one == choice}
        else:
            for event in engine.step():
                if event.admitted is not None:  # it is the request's, whichever answers are still wanted
                    continue
                assert (event.ticket, event.choice) not in gone | whole
                found[event.ticket, event.choice] += event.tokens
                if event.finish_reason is not None:
                    whole.add((event.ticket, event.choice))
        owned = [owner for owner in engine._allocation.owners if owner is not None]
        assert len(owned) == len({id(owner) for owner in owned})
        assert all(engine._allocation.owners[owner.slot] is owner and not owner.done for owner in owned)
    while engine.busy:
        for event in engine.step():
            if event.admitted is not None:
                continue
            assert (event.ticket, event.choice) not in gone
            found[event.ticket, event.choice] += event.tokens
            whole.add((event.ticket, event.choice)) if event.finish_reason is not None else None
    assert_empty(engine)
    for ticket, request in live.items():
        expected = [candidate.ids for candidate in trained_generator.candidates(request.prompt, request.sampling)]
        for choice in range(request.sampling.n):
            assert ((ticket, choice) in whole) or ((ticket, choice) in gone)
            if (ticket, choice) not in gone and choice < len(expected):
                assert found[ticket, choice] == expected[choice]
    engine.close()


def test_memory_stays_flat(trained_generator: OrtGenerator) -> None:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("resident memory is read from Linux's /proc")
    engine = engine_of(trained_generator, slots=8, prefill_tokens=64, max_queue=999)

    def traffic(seed: int) -> int:
        for request in mixed_requests(150, seed):
            engine.submit(request)
        finish(engine)
        return int(statm.read_text().split()[1])  # pages

    traffic(0)
    before = traffic(1)
    after = [traffic(seed) for seed in range(2, 6)][-1]
    assert after - before < 0.03 * before
    assert engine.memory_bytes == 8 * 128 * 2 * 2 * 2 * 16 * 4 * 3 // 2  # slots, tokens, K and V, layers, heads, width


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.submit(Request(prompt=[], sampling=Sampling())), "the prompt is empty"),
        (lambda e: e.submit(Request(prompt=[5] * 64, sampling=Sampling())), "64 tokens, the model's context is 64"),
        (lambda e: e.submit(Request(prompt=[97], sampling=Sampling())), "token id 97 is outside"),
        (lambda e: e.submit(Request(prompt=[5], sampling=Sampling(beams=3))), "3 beams need as many slots"),
    ],
)
def test_requests_that_cannot_be_answered(trained_generator: OrtGenerator, call, message: str) -> None:
    engine = engine_of(trained_generator, slots=2, context=64)
    with pytest.raises(UsageError, match=message):
        call(engine)
    assert not engine.busy


@pytest.mark.parametrize("options", [{"slots": 0}, {"max_queue": -1}, {"prefill_tokens": 0}, {"context": 129}])
def test_options_that_make_no_sense(trained_generator: OrtGenerator, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        engine_of(trained_generator, **options)


def test_a_closed_engine_takes_nothing(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=2)
    engine.submit(Request(prompt=[5, 9], sampling=Sampling()))
    engine.step()
    engine.close()
    engine.close()
    assert not engine.busy
    assert engine.step() == []
    with pytest.raises(UsageError, match="closed"):
        engine.submit(Request(prompt=[5, 9], sampling=Sampling()))


def test_graphs_that_concatenate_answer_one_by_one(generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(generator.stream([5, 9], Sampling(max_new_tokens=6)))
    monkeypatch.setattr(generator, "in_place", False)
    monkeypatch.setattr(generator, "_idle", None)
    engine = generator.engine(EngineOptions(slots=2))
    tickets = [engine.submit(Request(prompt=[5, 9], sampling=Sampling(max_new_tokens=6))) for _ in range(2)]
    found = finish(engine)
    assert [found[ticket, 0] for ticket in tickets] == [expected] * 2
    assert engine.stats().slots == 1
