"""Beams among the rows of an engine, on a model so flat that they change places at nearly every step."""

from __future__ import annotations

import numpy as np
import pytest

from llmctl.engine import EngineOptions, Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator


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
