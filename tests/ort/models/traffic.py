"""Requests that join and leave an engine, and what their answers should have been."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import trained

from llmctl.engine import Engine, EngineOptions, Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator
from llmctl.ort.scheduler import OrtEngine

GAP = 1e-4
"""Steps whose two likeliest tokens are nearer than this are not judged: a batch rounds differently."""


def engine_of(generator: OrtGenerator, **options) -> OrtEngine:
    engine = generator.engine(EngineOptions(**options))
    assert isinstance(engine, OrtEngine)
    return engine


def finish(engine: Engine, answers: dict[tuple[int, int], list[int]] | None = None) -> dict[tuple[int, int], list[int]]:
    """Step until nothing is left; the tokens by ticket and choice."""
    found = defaultdict(list, answers or {})
    while engine.busy:
        for event in engine.step():
            assert event.error is None, event.error
            found[event.ticket, event.choice] += event.tokens
    return found


def assert_empty(engine: OrtEngine) -> None:
    """Every slot was returned and nothing is remembered of any request."""
    assert engine._allocation.owners == [None] * engine.options.slots
    assert not (engine._tasks or engine._reading or engine._forking or len(engine._waiting))
    stats = engine.stats()
    assert (stats.waiting, stats.running) == (0, 0)
    assert stats.cache_used <= stats.cache_capacity


def mixed_requests(count: int, seed: int = 1) -> Iterator[Request]:
    """Greedy requests, most of which begin like others, some of which go on from an earlier one's whole prompt."""
    random = np.random.default_rng(seed)
    heads = [trained.sentence(random, length) for length in (12, 25, 40)]
    earlier: list[list[int]] = []
    for i in range(count):
        kind = random.random()
        head = heads[random.integers(3)] if kind < 0.5 else earlier[random.integers(i)] if kind < 0.7 and i else []
        prompt = head[:70] + trained.sentence(random, int(random.integers(2, 20)))
        earlier.append(prompt)
        yield Request(prompt=prompt, sampling=Sampling(max_new_tokens=int(random.integers(1, 35))), client=str(i % 3))


def disagreements(generator: OrtGenerator, request: Request, answer: Sequence[int], ended: bool) -> tuple[int, int]:
    """Steps of a greedy answer that choose another token than the model run alone over the same text: how many, and
    how many more were too close to be judged."""
    said = [*request.prompt, *answer]
    logits = generator.logits(said)[len(request.prompt) - 1 :]
    top = np.sort(logits, axis=1)[:, -2:]
    close = top[:, 1] - top[:, 0] < GAP
    chosen = [*answer, *([trained.EOS] if ended else [])]
    wrong = logits[: len(chosen)].argmax(axis=1) != np.array(chosen, np.int64)
    close = close[: len(chosen)]
    return int((wrong & ~close).sum()), int(close.sum())


def run_traffic(generator: OrtGenerator, count: int, cancels: bool = True, **options) -> tuple[OrtEngine, int, int]:
    """Requests that join at random steps and are cancelled at random; wrong and unjudged steps of all answers."""
    random = np.random.default_rng(7)
    engine = engine_of(generator, **{"slots": 6, "prefill_tokens": 24, "max_queue": count, **options})
    coming, requests = mixed_requests(count), {}
    answers: dict[int, list[int]] = defaultdict(list)
    ends: dict[int, str] = {}
    more = True
    while more or engine.busy:
        for _ in range(random.integers(0, 3)):
            request = next(coming, None)
            more = request is not None
            if request is not None:
                requests[engine.submit(request)] = request
        live = [ticket for ticket in requests if ticket not in ends]
        if cancels and live and random.random() < 0.03:
            ticket = int(random.choice(live))
            engine.cancel(ticket)
            ends[ticket] = "cancelled"
        for event in engine.step():
            assert event.error is None
            assert event.ticket not in ends, "an event after the last one"
            answers[event.ticket] += event.tokens
            if event.finish_reason:
                ends[event.ticket] = event.finish_reason
    assert set(ends) == set(requests)
    for ticket, reason in ends.items():
        limit = min(requests[ticket].sampling.max_new_tokens, generator.context_length - len(requests[ticket].prompt))
        assert reason != "length" or len(answers[ticket]) == limit
    judged = [disagreements(generator, requests[t], answers[t], ends[t] == "stop") for t in requests]
    assert_empty(engine)
    assert cancels == ("cancelled" in ends.values())
    return engine, sum(wrong for wrong, _ in judged), sum(close for _, close in judged)


def run_mixed(
    generator: OrtGenerator, requests: Sequence[Request], **options
) -> tuple[int, int, dict[str | None, list[list[int]]]]:
    """Answers to requests that join at random steps: wrong and unjudged steps against single runs, and the answers."""
    random = np.random.default_rng(3)
    engine = engine_of(generator, **{"slots": 6, "prefill_tokens": 24, "max_queue": len(requests), **options})
    coming, asked = iter(requests), {}
    answers: dict[int, list[int]] = defaultdict(list)
    ends: dict[int, str] = {}
    while len(asked) < len(requests) or engine.busy:
        for request in [one for _ in range(random.integers(0, 3)) if (one := next(coming, None)) is not None]:
            asked[engine.submit(request)] = request
        for event in engine.step():
            assert event.error is None
            answers[event.ticket] += event.tokens
            if event.finish_reason:
                ends[event.ticket] = event.finish_reason
    assert set(ends) == set(asked)
    assert_empty(engine)
    found: dict[str | None, list[list[int]]] = defaultdict(list)
    wrong = close = 0
    for ticket, request in asked.items():
        alone = generator.with_adapter(request.adapter)
        off, unjudged = disagreements(alone, request, answers[ticket], ends[ticket] == "stop")
        wrong, close = wrong + off, close + unjudged
        found[request.adapter].append(answers[ticket])
    assert engine.stats().cached_tokens > 0 or not engine.options.prefix_cache
    engine.close()
    return wrong, close, found
