"""Ways of decoding compared by `eval`, on a source of known entropy; the measures against sacrebleu and by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from llmctl import Artifact, InputError, TempFail
from llmctl.beams import BeamSearch
from llmctl.decoding import Answer, draw, search_beams
from llmctl.generator import Candidate, Sampling
from llmctl.ort.sampling import choose, log_probability, rank, state
from llmctl.testing import run_stage
from llmctl.text.shards import ShardWriter
from llmctl_eval import EVAL
from llmctl_eval.diversity import bleu, distinct, repetition, self_bleu
from llmctl_eval.intervals import Bootstrap, Interval

KINDS, FIRST = 12, 10
"""The source speaks tokens FIRST to FIRST + KINDS - 1 of the byte tokenizer."""


class Chain:
    """A Markov chain as a model: rows that remember their last token. Its entropy rate is known."""

    backend, eos_ids, encoder_decoder, context_length = "chain", frozenset({1}), False, 64

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        chain = np.random.default_rng(4).dirichlet(np.full(KINDS, 0.4), KINDS)
        stationary = np.linalg.matrix_power(chain, 200)[0]
        self.entropy = float(-(stationary[:, None] * chain * np.log(chain)).sum())
        self.table = np.full((vocab_size, vocab_size), -50.0)
        self.table[FIRST : FIRST + KINDS, FIRST : FIRST + KINDS] = np.log(chain)
        self.runs = 0

    def candidates(self, prompt: Sequence[int], sampling: Sampling) -> list[Candidate]:
        self.runs += 1
        rows, logits, limit = _Rows(self.table, [prompt[-1]]), self.table[[prompt[-1]]], sampling.max_new_tokens
        if sampling.beams > 1:
            return search_beams(rows, logits, BeamSearch(sampling, self.eos_ids, limit), rank)[: sampling.n]
        answers = [Answer(state(single, prompt, self.vocab_size), limit) for single in sampling.draws()]
        draw(rows.keep([0] * sampling.n), logits.repeat(sampling.n, 0), answers, self.eos_ids, choose, log_probability)
        return [one.candidate(sampling.length_penalty) for one in answers]


class _Rows:
    def __init__(self, table: np.ndarray, last: Sequence[int]) -> None:
        self.table, self.last = table, list(last)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        self.last = list(tokens)
        return self.table[self.last]

    def hold(self, rows: Sequence[int]) -> None:
        assert not rows, "no answer ends early"

    def keep(self, rows: Sequence[int]) -> _Rows:
        return _Rows(self.table, [self.last[row] for row in rows])


@pytest.fixture
def chain(opens, model_dir, byte_tokenizer):
    source = Chain(byte_tokenizer.vocab_size)
    opens({model_dir: source})
    return source


@pytest.fixture
def evaluate(tmp_path, model_dir, byte_tokenizer, chain):
    """Run the stage over 16 documents of 8 tokens; each call in a directory of its own."""
    with ShardWriter(
        tmp_path / "tokens", vocab_size=byte_tokenizer.vocab_size, tokenizer=byte_tokenizer.digest
    ) as writer:
        random = np.random.default_rng(2)
        for _ in range(16):
            writer.add("validation", random.integers(FIRST, FIRST + KINDS, 8).tolist(), 8)
        writer.add("validation", [FIRST] * 3, 3)  # too short to go on
    tokens = Artifact(tmp_path / "tokens", "dataset.tokens")

    def run(name: str, **params):
        given = {"tasks": ["decoding"], "prompt_tokens": 3, "max_new_tokens": 40, "top_k": 3, "top_p": 0.8, **params}
        model = Artifact(model_dir, "model.onnx")
        return run_stage(EVAL, tmp_path / name, given, model=model, data=[tokens])

    return run


def test_strategies_are_ordered_by_diversity_and_by_likelihood(evaluate, chain):
    result = evaluate("all", strategies=["greedy", "beam", "top-k", "nucleus", "plain", "focused", "creative"])
    m = result.metrics
    ways = ("greedy", "beam", "nucleus", "plain")
    distinct_2 = [m[f"decoding.{way}.distinct_2"] for way in ways]
    assert distinct_2 == sorted(distinct_2)
    assert len(set(distinct_2)) == 4
    alike = [m[f"decoding.{way}.self_bleu"] for way in ways]
    assert alike == sorted(alike, reverse=True)
    assert alike[0] == m["decoding.greedy.self_bleu_low"] == 1
    assert [m[f"decoding.{way}.distinct_2"] for way in ("focused", "plain", "creative")] == sorted(
        m[f"decoding.{way}.distinct_2"] for way in ("focused", "plain", "creative")
    )
    # Plain draws cost what the source's entropy says; whatever prefers the likelier tokens costs less.
    assert m["decoding.plain.nats_low"] < chain.entropy < m["decoding.plain.nats_high"]
    for way in ("greedy", "beam", "top_k", "nucleus", "focused"):
        assert m[f"decoding.{way}.nats_high"] < chain.entropy
    assert m["decoding.beam.nats"] <= m["decoding.greedy.nats"]
    assert m["decoding.greedy.repetition"] > m["decoding.plain.repetition"]
    assert {m[f"decoding.{way}.tokens"] for way in ways} == {40}
    assert all(m[f"decoding.{way}.seconds"] > 0 for way in ways)
    rows = [json.loads(line) for line in (result.outputs["metrics"] / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 7 * 16
    assert {len(row["answers"]) for row in rows} == {4}


@pytest.mark.slow
def test_seeds_of_one_strategy_agree_where_strategies_do_not(evaluate):
    first = evaluate("first", strategies=["nucleus", "plain"]).metrics
    others = [evaluate(f"seed{seed}", strategies=["nucleus"], seed=seed * 1000).metrics for seed in range(1, 11)]

    def within(name: str, metrics, way: str) -> bool:
        """The interval of `metrics` overlaps that of nucleus under the first seed."""
        ours, theirs = f"decoding.nucleus.{name}", f"decoding.{way}.{name}"
        return first[f"{ours}_low"] <= metrics[f"{theirs}_high"] and metrics[f"{theirs}_low"] <= first[f"{ours}_high"]

    for name in ("nats", "distinct_2", "self_bleu"):
        assert all(within(name, other, "nucleus") for other in others)
        assert not within(name, first, "plain")
    assert len({other["decoding.nucleus.nats"] for other in others}) == 10


def test_a_stopped_comparison_goes_on(evaluate, chain, tmp_path, monkeypatch):
    whole = evaluate("whole", strategies=["plain"]).metrics
    answers = Chain.candidates

    def stop(self, prompt, sampling):
        if self.runs == 16 + 9:
            self.runs += 1
            raise TempFail("stopped")
        return answers(self, prompt, sampling)

    monkeypatch.setattr(Chain, "candidates", stop)
    with pytest.raises(TempFail):
        evaluate("again", strategies=["plain"])
    again = evaluate("again", strategies=["plain"]).metrics
    assert chain.runs == 16 + 16 + 1
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in whole.items() if "seconds" not in k
    }


def test_what_cannot_be_compared(evaluate):
    with pytest.raises(InputError, match="no document in split `validation` of .* goes on after 9 tokens"):
        evaluate("long", prompt_tokens=9)


def test_intervals_of_equal_values_are_points():
    from llmctl_eval.decoding import summary

    sample = {"logprob": -2.0, "scored": 4, "seconds": 1.0, "tokens": 4.0, "repetition": 0.0}
    sample |= {"distinct_1": 1.0, "distinct_2": 1.0, "self_bleu": 1.0}
    found = summary([sample] * 5, Bootstrap())
    assert found["nats"] == found["nats_low"] == 0.5
    assert Interval(*(found[f"self_bleu{end}"] for end in ("", "_low", "_high"))) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [  # of sacrebleu 2.6.0: BLEU(tokenize="none", effective_order=True).sentence_score
        ("5 6 7 8 9", ["5 6 7 8 9"], 100.00000000000004),
        ("5 6 7 8 9 9", ["5 6 7 1 2", "8 9 9 5"], 50.81327481546149),
        ("1 2", ["3 4 5"], 0.0),
        ("1 2 3", ["3 2 1 4 4 4", "1 2 9"], 62.996052494743665),
        ("4 4 4 4", ["4 4", "4 1 1 1 1"], 24.880469496253564),
        ("7", ["7 8", "1"], 100.00000000000004),
        ("1 2 3 4 5 6 7", ["1 9 3 4 9 6"], 15.619699684601283),
    ],
)
def test_bleu_is_that_of_sacrebleu(text, references, expected):
    ids, others = [int(word) for word in text.split()], [[int(word) for word in one.split()] for one in references]
    assert 100 * bleu(ids, others) == pytest.approx(expected, abs=1e-9)


def test_repetition_and_distinct_by_hand():
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 2, 1, 2, 1, 2], n=2) == pytest.approx(3 / 5)
    assert repetition([1, 2]) == 0
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct([[1]], 2) == 0
    assert self_bleu([[1, 2, 3]] * 3) == pytest.approx(1)
    assert self_bleu([[], []]) == 1
    assert self_bleu([[1, 2], [3, 4]]) == 0
