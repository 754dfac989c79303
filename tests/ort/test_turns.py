"""Whose turn it is when a slot falls free: further answers to one prompt take turns with everybody's requests."""

from __future__ import annotations

import numpy as np
import pytest
import trained
from traffic import assert_empty, engine_of, finish

from llmctl.engine import Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator
from llmctl.ort.cache_memory import HostMemory

ENDLESS = ((1, -100.0),)
"""A bias under which no answer ends before its limit."""


def drawn(n: int, tokens: int = 20, seed: int = 1) -> Sampling:
    return Sampling(max_new_tokens=tokens, temperature=1.0, seed=seed, n=n, logit_bias=ENDLESS)


@pytest.mark.parametrize(("requests", "n"), [(20, 1), (1, 20), (5, 20)])
def test_a_client_waits_for_one_turn_of_another_however_many_answers_that_wants(
    trained_generator: OrtGenerator, requests: int, n: int
) -> None:
    engine = engine_of(trained_generator, slots=2, max_queue=99)
    for seed in range(requests):
        engine.submit(Request(prompt=[5, 9], sampling=drawn(n, seed=seed), client="many"))
    for _ in range(3):
        engine.step()
    waits = engine.submit(Request(prompt=[7, 9], sampling=Sampling(max_new_tokens=3), client="one"))
    steps = 1
    while not any(event.ticket == waits and event.admitted for event in engine.step()):
        steps += 1
    assert steps <= 20, "an answer takes 20 steps, and two run"
    engine.close()
    assert_empty(engine)


def test_beams_get_their_slots_though_draws_wait(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=2, max_queue=9)
    engine.submit(Request(prompt=[5, 9], sampling=drawn(30, 10), client="many"))
    engine.step()
    beams = engine.submit(Request(prompt=[7, 9], sampling=Sampling(max_new_tokens=4, beams=2), client="one"))
    ends = next(step for step in range(300) if any(e.ticket == beams and e.finish_reason for e in engine.step()))
    assert ends < 30, "all draws take 150 steps"
    engine.close()


def test_draws_that_wait_are_no_requests_that_wait(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=1, max_queue=1)
    many = engine.submit(Request(prompt=[5, 9], sampling=drawn(3, 4)))
    for _ in range(2):
        engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)
    engine.submit(Request(prompt=[5, 6], sampling=Sampling(max_new_tokens=1)))
    assert engine.stats().waiting == 1
    engine.cancel(many, 1)
    engine.cancel(many, 2)
    finish(engine)
    assert_empty(engine)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_draws_between_those_of_others_are_those_of_single_runs(
    trained_generator: OrtGenerator, prefix_cache: bool
) -> None:
    random = np.random.default_rng(5)
    prompts = [trained.sentence(random, 12) for _ in range(4)]
    requests = [
        Request(prompt=prompt, sampling=drawn(n, 9, seed=seed), client=str(seed % 3))
        for seed, (prompt, n) in enumerate(zip(prompts * 2, [5, 1, 3, 2, 4, 1, 2, 6], strict=True))
    ]
    engine = engine_of(trained_generator, slots=2, max_queue=99, prefill_tokens=8, prefix_cache=prefix_cache)
    for request in requests:
        engine.submit(request)
    found = finish(engine)
    for ticket, request in enumerate(requests):
        alone = engine_of(trained_generator, slots=8, prefill_tokens=64, prefix_cache=False)
        alone.submit(request)
        assert {key: found[ticket, key] for key in range(request.sampling.n)} == {
            choice: tokens for (_, choice), tokens in finish(alone).items()
        }
    assert_empty(engine)


def test_what_a_request_has_read_itself_was_not_cached(trained_generator: OrtGenerator) -> None:
    engine = engine_of(trained_generator, slots=2, prefill_tokens=8)
    ticket = engine.submit(Request(prompt=trained.sentence(np.random.default_rng(3), 30), sampling=drawn(2, 3)))
    for _ in range(3):
        engine.step()
    engine.cancel(ticket, 0)
    events = []
    while engine.busy:
        events += [event for event in engine.step() if event.admitted is None]
    assert events[0].cached == 0
    assert engine.stats().cached_tokens == 0


def test_a_prompt_that_is_read_again_is_scored_once(trained_generator: OrtGenerator) -> None:
    prompt = trained.sentence(np.random.default_rng(3), 30)
    engine = engine_of(trained_generator, slots=1, prefill_tokens=7)
    ticket = engine.submit(Request(prompt=prompt, sampling=drawn(2, 3), prompt_logprobs=0))
    other = engine.submit(Request(prompt=prompt[:9] + [5, 6, 7], sampling=drawn(1, 3), client="other"))
    events = []
    while engine.busy:
        events += [event for event in engine.step() if event.admitted is None]
    scored = [event.prompt_scores for event in events if event.prompt_scores is not None]
    assert [len(one) for one in scored] == [30]
    assert {event.ticket for event in events} == {ticket, other}
    assert engine.stats().prompt_tokens < 30 + 12 + 30, "the second reading takes over what is known"


def test_a_copy_that_fails_leaves_nothing_that_is_believed(
    trained_generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(trained_generator, slots=2)
    slots = engine._slots
    slots.feed(0, np.array([5, 6, 7, 8], np.int32))
    slots.feed(1, np.array([9, 10, 11, 12], np.int32))

    def torn(memory: HostMemory, source: int, target: int, start: int, stop: int) -> None:
        raise MemoryError

    monkeypatch.setattr(HostMemory, "copy", torn)
    with pytest.raises(MemoryError):
        slots.copy(0, 1, 4, start=2)
    assert slots.match(np.array([9, 10, 11, 12], np.int32)).tolist() == [0, 2]
