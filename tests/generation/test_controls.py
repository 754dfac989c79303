"""Penalties, bias and constraints by both engines: beams against transformers, every way of answering the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import llmctl_export_onnx
from llmctl import Artifact
from llmctl.errors import UsageError
from llmctl.generator import LARGEST, Sampling
from llmctl.ort import open_generator
from llmctl.testing import run_stage
from llmctl.train.generate import open_model

from .conftest import EOS, Flat
from .test_beams import prompt_of, theirs
from .test_encoder_decoder import fresh

VOCAB = 97
DRAWS = Sampling(
    max_new_tokens=16,
    temperature=0.8,
    min_p=0.02,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    presence_penalty=0.3,
    logit_bias=((9, 2.0), (10, -5.0)),
    seed=3,
    n=5,
)


class Rising:
    """A constraint: each token is above the last, and the answer ends where none is left or below 50 tokens."""

    def __init__(self, vocab: int, last: int = 3) -> None:
        self.vocab, self.last = vocab, last

    def mask(self) -> np.ndarray:
        allowed = np.arange(self.vocab) > self.last
        allowed[EOS] = self.last > self.vocab // 2
        return allowed

    def accept(self, token: int) -> None:
        assert token == EOS or token > self.last
        self.last = max(token, self.last)

    def copy(self) -> Rising:
        return Rising(self.vocab, self.last)


@pytest.fixture(scope="module")
def model(flat) -> Flat:
    return flat(VOCAB, 0.1)


@pytest.mark.parametrize("engine", ["torch", "ort"])
@pytest.mark.parametrize("penalty", [1.4, 0.7])
def test_beams_with_a_repetition_penalty_are_those_of_transformers(engine: str, penalty: float, flat) -> None:
    model = flat(8, 0.3)
    generator, differ = model.open(engine), 0
    for seed in range(12):
        prompt = prompt_of(seed)
        plain = Sampling(max_new_tokens=12, beams=4, n=4, early_stopping=seed % 2 == 0)
        model.theirs.generation_config.repetition_penalty = penalty
        try:
            expected = theirs(model.theirs, prompt, plain)
        finally:
            model.theirs.generation_config.repetition_penalty = None
        found = generator.candidates(prompt, replace(plain, repetition_penalty=penalty))
        assert [(one.ids, one.ended) for one in found] == [(ids, ended) for ids, ended, _ in expected]
        differ += [one.ids for one in found] != [one.ids for one in generator.candidates(prompt, plain)]
        for one in found:  # the log-probabilities stay the model's own
            ids = [*one.ids, EOS] if one.ended else one.ids
            truth = generator.logprobs([*prompt, *ids])[len(prompt) - 1 :]
            assert one.logprobs == pytest.approx(truth, abs=1e-5)
    assert differ > 6, "the penalty must matter"


@pytest.mark.parametrize("engine", ["torch", "ort"])
@pytest.mark.parametrize("forced", [False, True], ids=["free", "constrained"])
def test_draws_streams_and_batches_agree(engine: str, forced: bool, model: Flat) -> None:
    generator = model.open(engine)
    constraint = Rising(VOCAB) if forced else None
    prompts = [prompt_of(seed) for seed in range(5)]
    for prompt in prompts[:2]:
        found = generator.candidates(prompt, DRAWS, constraint)
        assert [one.ids for one in found] == [
            list(generator.stream(prompt, replace(DRAWS, n=1, seed=3 + i), constraint)) for i in range(5)
        ]
        assert len({tuple(one.ids) for one in found}) > 2
        if forced:
            assert all(one.ids == sorted(set(one.ids)) for one in found)
            assert all(one.ids[-1] > VOCAB // 2 for one in found if one.ended)
    single = replace(DRAWS, n=1)
    assert generator.generate(prompts, single, constraint) == [
        list(generator.stream(prompt, single, constraint)) for prompt in prompts
    ]


def test_both_engines_choose_the_same_greedily(model: Flat) -> None:
    greedy = replace(DRAWS, temperature=0.0, min_p=0.0, n=1)
    prompts = [prompt_of(seed) for seed in range(6)]
    for constraint in (None, Rising(VOCAB)):
        found = [model.open(engine).generate(prompts, greedy, constraint) for engine in ("torch", "ort")]
        assert found[0] == found[1]
    assert found[0] != model.open("torch").generate(prompts, greedy)


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_constrained_beams_are_allowed_ones_best_first(engine: str, model: Flat) -> None:
    generator = model.open(engine)
    found = generator.candidates(prompt_of(0), Sampling(max_new_tokens=6, beams=4, n=4), Rising(VOCAB))
    assert len(found) == 4
    for one in found:
        assert one.ids == sorted(set(one.ids))
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    # Fewer answers exist than beams: 96, and nothing but an end after it.
    few = generator.candidates(prompt_of(0), Sampling(max_new_tokens=6, beams=4, n=4), Rising(VOCAB, 94))
    assert sorted(one.ids for one in few if one.ended) == [[], [95], [95, 96], [96]]


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_the_greatest_bias_is_followed_by_beams_as_by_greedy_decoding(engine: str, model: Flat) -> None:
    generator = model.open(engine)
    for more in ({}, {"repetition_penalty": 0.01}, {"frequency_penalty": -LARGEST}):
        sampling = Sampling(max_new_tokens=6, logit_bias=((20, LARGEST),), **more)
        assert list(generator.stream([5, 6], sampling)) == [20] * 6
        assert generator.candidates([5, 6], replace(sampling, beams=2))[0].ids == [20] * 6


class Forked(Rising):
    """As `Rising`, but nothing comes after 40 and 95."""

    def mask(self) -> np.ndarray:
        return super().mask() & (self.last not in (40, 95))

    def copy(self) -> Forked:
        return Forked(self.vocab, self.last)


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_a_beam_that_cannot_go_on_is_given_up_and_no_other(engine: str, model: Flat) -> None:
    generator = model.open(engine)
    sampling = Sampling(max_new_tokens=4, beams=3, n=3, logit_bias=((40, 5.0),))
    found = generator.candidates(prompt_of(0), sampling, Forked(VOCAB))
    assert len(found) == 3
    assert all(40 not in one.ids[:-1] for one in found)
    with pytest.raises(UsageError, match="no beam can go on: the constraint allows no token"):
        generator.candidates(prompt_of(0), sampling, Forked(VOCAB, 95))


@pytest.mark.parametrize("engine", ["torch", "ort"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_stream_returns_the_id_that_ended_it(engine: str, beams: int, model: Flat) -> None:
    generator = model.open(engine)
    generator.eos_ids = frozenset({7, 20})

    def said(**more) -> tuple[list[int], int | None]:
        stream, ids = generator.stream([5, 6], Sampling(max_new_tokens=3, beams=beams, **more)), []
        while True:
            try:
                ids.append(next(stream))
            except StopIteration as stop:
                return ids, stop.value

    for end in (7, 20):
        bias = ((7, 0.0), (20, 0.0), (end, 99.0))
        assert said(logit_bias=tuple(dict(bias).items())) == ([], end)
    ids, end = said(logit_bias=((7, -99.0), (20, -99.0)))
    assert (len(ids), end) == (3, None)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 of transformers that minds its source, and both engines with its weights."""
    model = fresh("t5")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "Attention" in name or "DenseReluDense" in name:
                parameter.normal_(0, 0.35 if "Attention" in name else 0.3)
        model.shared.weight.normal_(0, 0.4)
    directory = tmp_path_factory.mktemp("t5")
    model.save_pretrained(directory)
    exported = run_stage(
        llmctl_export_onnx.EXPORT_ONNX,
        tmp_path_factory.mktemp("export"),
        {"parity_prompts": 2, "threads": 1},
        model=Artifact(directory, "model.hf"),
    )
    engines = {
        "torch": open_model(directory, "cpu"),
        "ort": open_generator(exported.outputs["model"].path, "cpu", 1),
    }
    return model, engines


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "draws", "beams"])
def test_an_encoder_decoder_counts_what_the_decoder_is_given(kind: str, t5) -> None:
    model, engines = t5
    source = [4, 5, 6, 7, 8, 1]
    options = {
        "greedy": {"do_sample": False},
        "draws": {"do_sample": True, "temperature": 0.9, "top_k": 0, "min_p": 0.1},
        "beams": {"do_sample": False, "num_beams": 3},
    }[kind]
    ours = {
        "greedy": Sampling(),
        "draws": Sampling(temperature=0.9, min_p=0.1, seed=5),
        "beams": Sampling(beams=3),
    }[kind]
    torch.manual_seed(5)
    row = model.generate(torch.tensor([source]), max_new_tokens=10, repetition_penalty=1.6, **options)[0, 1:].tolist()
    expected = row[: row.index(1)] if 1 in row else row
    for name, generator in engines.items():
        if kind == "draws" and name == "ort":
            continue  # it draws with numpy
        sampling = replace(ours, repetition_penalty=1.6, max_new_tokens=10)
        assert list(generator.stream(source, sampling)) == expected
        assert generator.generate([source, source[2:]], sampling)[0] == expected
