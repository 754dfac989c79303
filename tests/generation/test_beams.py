"""Beam search of both engines against transformers' own, with faults that must not pass, and on planted trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.beams import BeamSearch, Continuation
from llmctl.decoding import search_beams
from llmctl.errors import UsageError
from llmctl.generator import Candidate, Generator, Sampling
from llmctl.ort import generator as ort_engine
from llmctl.ort.cache import InPlaceRows
from llmctl.ort.sampling import rank
from llmctl.train import generate as torch_engine
from llmctl.train.rows import TorchRows

from .conftest import EOS, Flat

VOCAB, NEW, BEAMS = 8, 12, 4
SETTINGS = [
    Sampling(max_new_tokens=NEW, beams=BEAMS, n=BEAMS, length_penalty=penalty, early_stopping=early)
    for penalty in (0.0, 1.0, 2.0)
    for early in (True, False)
]
Answer = tuple[list[int], bool, float]


def prompt_of(seed: int) -> list[int]:
    torch.manual_seed(seed)
    return torch.randint(0, VOCAB, (4,)).tolist()


def theirs(model: Any, prompt: list[int], sampling: Sampling) -> list[Answer]:
    """transformers' n best answers: ids before EOS, whether it came, score."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        num_beams=sampling.beams,
        num_return_sequences=sampling.n,
        max_new_tokens=sampling.max_new_tokens,
        length_penalty=sampling.length_penalty,
        early_stopping=sampling.early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [row[len(prompt) :] for row in out.sequences.tolist()]
    scores = out.sequences_scores.tolist()
    return [
        (row[: row.index(EOS)] if EOS in row else row, EOS in row, score)
        for row, score in zip(rows, scores, strict=True)
    ]


def agree(found: Sequence[Candidate], expected: Sequence[Answer]) -> bool:
    return len(found) == len(expected) and all(
        (one.ids, one.ended) == (ids, ended) and one.score == pytest.approx(score, rel=1e-5, abs=1e-5)
        for one, (ids, ended, score) in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def model(flat) -> Flat:
    return flat(VOCAB, 0.3)


@pytest.fixture(scope="module")
def cases(model: Flat) -> list[tuple[list[int], Sampling, list[Answer]]]:
    """20 prompts x 3 length penalties x 2 rules for the end, with what transformers answers."""
    return [(p, s, theirs(model.theirs, p, s)) for p in map(prompt_of, range(20)) for s in SETTINGS]


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_all_beams_and_their_scores_equal_those_of_transformers(engine: str, model: Flat, cases) -> None:
    generator = model.open(engine)
    assert sum(agree(generator.candidates(prompt, s), expected) for prompt, s, expected in cases) == 120
    ended = sum(expected[0][1] for _, _, expected in cases)
    assert 50 < ended < 80, "some answers must end with EOS and some at the limit, or faults pass"
    prompt, sampling, expected = cases[0]
    best = replace(sampling, n=1)
    assert list(generator.stream(prompt, best)) == expected[0][0]
    assert generator.generate([prompt, prompt], best) == [expected[0][0]] * 2


class EveryRank(BeamSearch):
    """EOS is accepted from all 2B candidates."""

    def _accepts(self, rank: int) -> bool:
        return True


class Gnmt(BeamSearch):
    """The length penalty of 1609.08144."""

    def _score(self, total: float, length: int) -> float:
        return total / ((5 + length) / 6) ** self.sampling.length_penalty


class Narrow(BeamSearch):
    """B candidates, not 2B."""

    @property
    def wanted(self) -> int:
        return self.width


class EosUncounted(BeamSearch):
    """The length without EOS."""

    def _worth(self, answer: Candidate, total: float) -> float:
        return self._score(total, max(1, len(answer.ids)))


class Hasty(BeamSearch):
    """Ends as soon as B are done, whatever `early_stopping` says."""

    def _over(self, best: Any) -> bool:
        return len(self.finished) == self.width


@pytest.mark.parametrize(
    ("fault", "most"),
    [
        (EveryRank, 90),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in ((Gnmt, 110), (Narrow, 114), (EosUncounted, 114))),
        pytest.param(Hasty, 114, marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_noticed(fault: type[BeamSearch], most: int, model: Flat, cases, monkeypatch) -> None:
    """Only the best answer is compared, as a user sees it; the faults spoil 12 to 50 of 120."""
    for module in (torch_engine, ort_engine):
        monkeypatch.setattr(module, "BeamSearch", fault)
    for name in ("torch", "ort"):
        generator = model.open(name)
        right = sum(generator.candidates(prompt, s)[0].ids == expected[0][0] for prompt, s, expected in cases)
        print(fault.__name__, name, right)
        assert right <= most
        if name == "torch":
            count = right
    assert count == right, "both engines share the rules, right or wrong"


@pytest.mark.parametrize("rows", [TorchRows, InPlaceRows])
def test_a_cache_that_is_not_reordered_is_noticed(rows: type, model: Flat, cases, monkeypatch) -> None:
    keep = rows.keep
    monkeypatch.setattr(rows, "keep", lambda self, at: keep(self, sorted(at)))
    generator = model.open("torch" if rows is TorchRows else "ort")
    assert sum(generator.candidates(p, s)[0].ids == expected[0][0] for p, s, expected in cases) < 100


@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping": "never"},
        {"early_stopping": "never", "length_penalty": 2.0},
        {"early_stopping": "never", "length_penalty": -1.0},
        {"length_penalty": -0.5, "beams": 2, "n": 2},
        {"length_penalty": 0.3, "beams": 5, "n": 1},
    ],
)
@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_other_settings_equal_transformers(engine: str, options: dict[str, Any], model: Flat) -> None:
    generator = model.open(engine)
    sampling = replace(SETTINGS[3], **options)
    for prompt in map(prompt_of, range(100, 106)):
        assert agree(generator.candidates(prompt, sampling), theirs(model.theirs, prompt, sampling))


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_several_eos_ids_widen_the_search(engine: str, model: Flat, monkeypatch) -> None:
    generator = model.open(engine)
    generator.eos_ids = frozenset({2, 5})
    monkeypatch.setattr(model.theirs.generation_config, "eos_token_id", [2, 5])
    sampling = replace(SETTINGS[3], n=1)
    for prompt in map(prompt_of, range(20)):
        ours = generator.candidates(prompt, sampling)[0]
        row = model.theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 4), num_beams=BEAMS, max_new_tokens=NEW
        )[0, 4:].tolist()
        end = next((i for i, token in enumerate(row) if token in (2, 5)), None)
        assert (ours.ids, ours.ended) == (row[:end], end is not None)


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_log_probabilities_are_those_of_the_model(engine: str, model: Flat) -> None:
    generator = model.open(engine)
    for prompt in map(prompt_of, range(5)):
        for one in generator.candidates(prompt, SETTINGS[2]):
            said = [*one.ids, *([EOS] if one.ended else [])]
            with torch.no_grad():
                truth = model.theirs(torch.tensor([prompt + said])).logits[0].double().log_softmax(-1)
            expected = [float(truth[len(prompt) - 1 + i, token]) for i, token in enumerate(said)]
            assert one.logprobs == pytest.approx(expected, abs=1e-5)
            assert one.score == pytest.approx(sum(expected) / len(said), abs=1e-5)


@pytest.mark.parametrize(("engine", "rows"), [("torch", TorchRows), ("ort", InPlaceRows)])
def test_beams_are_no_less_likely_than_greedy_and_cost_one_pass_a_token(engine, rows, model: Flat, monkeypatch) -> None:
    generator = model.open(engine)
    passes = []
    step = rows.step
    monkeypatch.setattr(rows, "step", lambda self, tokens: (passes.append(len(tokens)), step(self, tokens))[1])
    better = 0
    for prompt in map(prompt_of, range(20)):
        passes.clear()
        beam = generator.candidates(prompt, Sampling(max_new_tokens=NEW, beams=BEAMS, length_penalty=0.0))[0]
        assert len(passes) <= NEW - 1
        assert set(passes) <= {BEAMS}
        greedy = generator.candidates(prompt, Sampling(max_new_tokens=NEW))[0]
        assert beam.logprob >= greedy.logprob - 1e-5
        better += beam.logprob > greedy.logprob + 1e-5
    assert better > 5, "else the beams do nothing"


class Planted:
    """Rows of a tree: `tree` gives the probabilities after each path, all mass on EOS where it says nothing."""

    def __init__(self, tree: dict[tuple[int, ...], list[float]], paths: list[tuple[int, ...]]) -> None:
        self.tree, self.paths = tree, paths

    def logits(self) -> np.ndarray:
        ends = [1e-9, 1e-9, 1.0, 1e-9]
        return np.log(np.array([self.tree.get(path, ends) for path in self.paths]))

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        self.paths = [(*path, token) for path, token in zip(self.paths, tokens, strict=True)]
        return self.logits()

    def hold(self, rows: Sequence[int]) -> None:
        raise AssertionError("beams have one length")

    def keep(self, rows: Sequence[int]) -> Planted:
        return Planted(self.tree, [self.paths[row] for row in rows])


TREE = {
    (): [0.5, 0.4, 0.05, 0.05],  # the likeliest first token leads to 0.5 * 0.35, the second to 0.4 * 0.9
    (0,): [0.35, 0.3, 0.05, 0.3],
    (1,): [0.05, 0.02, 0.03, 0.9],
}


@pytest.mark.parametrize(("width", "path", "probability"), [(1, [0, 0], 0.175), (2, [1, 3], 0.36), (3, [1, 3], 0.36)])
def test_the_best_path_begins_with_the_second_best_token(width: int, path: list[int], probability: float) -> None:
    rows = Planted(TREE, [()])
    search = BeamSearch(Sampling(beams=width, length_penalty=0.0), frozenset({EOS}), 8)
    found = search_beams(rows, rows.logits(), search, rank)[0]
    assert (found.ids, found.ended) == (path, True)
    assert math.exp(found.logprob) == pytest.approx(probability)


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_one_beam_is_greedy(engine: str, model: Flat, monkeypatch) -> None:
    class One(BeamSearch):
        """A search of width 1, which `candidates` would not start for `beams=1`."""

        def __init__(self, sampling: Sampling, eos_ids: frozenset[int], limit: int) -> None:
            super().__init__(replace(sampling, beams=1, n=1), eos_ids, limit)

    for module in (torch_engine, ort_engine):
        monkeypatch.setattr(module, "BeamSearch", One)
    generator = model.open(engine)
    for prompt in map(prompt_of, range(20)):
        greedy = Sampling(max_new_tokens=NEW)
        one = generator.candidates(prompt, replace(greedy, beams=2))[0]
        assert one == generator.candidates(prompt, greedy)[0]
        assert one.ids == list(generator.stream(prompt, greedy))


def test_every_beam_may_end_at_once() -> None:
    search = BeamSearch(Sampling(beams=2), frozenset({0, 1}), 5)
    assert search.wanted == 6
    assert search.step([Continuation(0, 1, -0.1, -0.1), Continuation(0, 0, -2.0, -2.0)]) == []
    assert [one.ids for one in search.finished] == [[], []]
    assert search.finished[0].score == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"beams": 0}, "beams must be at least 1, got 0", None),
        ({"n": 0}, "n must be at least 1", None),
        ({"length_penalty": float("nan")}, "length_penalty must be in", None),
        ({"early_stopping": "soon", "beams": 2}, "must be true, false or \"never\", got 'soon'", None),
        ({"early_stopping": 1, "beams": 2}, "early_stopping must be", None),
        ({"beams": 4, "temperature": 0.7}, "temperature is 0.7", "set temperature to 0, or beams to 1"),
        ({"beams": 4, "top_k": 5}, "top_k is 5", "leave top_k, top_p and min_p out"),
        ({"beams": 4, "top_p": 0.5}, "top_p 0.5", "leave top_k, top_p and min_p out"),
        ({"beams": 2, "n": 3}, "2 beams cannot give 3 answers", "set beams to 3 or more, or n to 2 or less"),
        ({"n": 3}, "greedy decoding has one answer, but n is 3", "temperature above 0"),
        ({"early_stopping": True}, "but beams is 1", "set beams above 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**options)
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_several_answers_are_refused_where_one_is_given(engine: str, model: Flat) -> None:
    generator: Generator = model.open(engine)
    for call in (generator.stream, lambda prompt, sampling: generator.generate([prompt], sampling)):
        with pytest.raises(UsageError, match="one answer is given here, but n is 2"):
            call([3], Sampling(beams=2, n=2))
