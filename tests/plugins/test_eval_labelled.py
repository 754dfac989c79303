"""Scores of labelled tasks against sacrebleu's own numbers, transformers' SQuAD metrics and counts by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from llmctl_eval.intervals import Bootstrap
from llmctl_eval.scores import answer_f1, bleu, chunks, further_scores, lead_score, macro_f1, rank_vectors, rouge_l

WORDS = st.lists(st.sampled_from(["the", "a", "cat", "sat.", "on", "Mat", "an,", "mat's"]), max_size=6).map(" ".join)


def test_bleu_is_sacrebleus_with_its_signature() -> None:
    answers = ["the cat sat on the mat", "a dog ran away today", "nothing at all here"]
    expected = ["the cat sat on a mat", "a dog ran away today", "something else here now"]
    found = bleu(answers, expected)
    assert found["seq2seq.bleu"] == pytest.approx(BLEU().corpus_score(answers, [expected]).score)
    assert found["seq2seq.bleu_signature"].startswith("nrefs:1|case:mixed")
    assert bleu(expected, expected)["seq2seq.bleu"] == pytest.approx(100)
    other = BLEU(tokenize="char")
    other.corpus_score(answers, [expected])
    assert str(other.get_signature()) != found["seq2seq.bleu_signature"]


@given(answer=WORDS, expected=WORDS)
def test_answers_have_squads_f1(answer: str, expected: str) -> None:
    metrics = pytest.importorskip("transformers.data.metrics.squad_metrics")
    assert answer_f1(answer, expected) == pytest.approx(metrics.compute_f1(expected, answer))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [  # the examples of Lin (2004), section 3.1, for "police killed the gunman"
        ("police kill the gunman", 0.75),
        ("the gunman kill police", 0.5),
        ("the gunman police killed", 0.5),
        ("Police, killed; the GUNMAN!", 1.0),
        ("", 0.0),
    ],
)
def test_rouge_l_is_lins(answer: str, expected: float) -> None:
    assert rouge_l(answer, "police killed the gunman") == pytest.approx(expected)


@given(answer=st.lists(st.sampled_from("abc"), max_size=6), expected=st.lists(st.sampled_from("abc"), max_size=6))
def test_rouge_l_counts_the_longest_common_subsequence(answer: list[str], expected: list[str]) -> None:
    def parts(words: list[str]) -> set[tuple[str, ...]]:
        return {some for size in range(len(words) + 1) for some in combinations(words, size)}

    longest = max(map(len, parts(answer) & parts(expected)))
    size = len(answer) + len(expected)
    assert rouge_l(" ".join(answer), " ".join(expected)) == pytest.approx(2 * longest / size if longest else 0)


def test_summaries_are_scored_beside_the_first_sentence() -> None:
    samples = [
        {"question": "The cat sat. A dog ran.", "answer": "the cat sat", "expected": "the cat sat"},
        {"question": "Nothing here! A dog ran", "answer": "a dog", "expected": "a dog ran"},
    ]
    boot = Bootstrap(resamples=100)
    assert further_scores("seq2seq", samples, boot)["seq2seq.rouge_l"] == pytest.approx((1 + 0.8) / 2)
    assert lead_score(samples, boot)["seq2seq.rouge_l_lead"] == pytest.approx((1 + 0) / 2)


def test_macro_f1_by_hand() -> None:
    expected, answers = list("aabbc"), list("abbba")
    # a: 1 hit of 2 and 2; b: 2 of 2 and 3; c: none.
    assert macro_f1(expected, answers) == pytest.approx((0.5 + 0.8 + 0) / 3)
    assert macro_f1(list("ab"), ["a", ""]) == pytest.approx((1 + 0) / 2)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),
        ("NOUN NOUN O", {("NOUN", 0, 1), ("NOUN", 1, 2)}),
        ("B-PER NOUN I-PER", {("PER", 0, 1), ("NOUN", 1, 2), ("PER", 2, 3)}),
    ],
)
def test_chunks(labels: str, expected: set) -> None:
    assert chunks(labels.split()) == expected


def test_words_and_chunks_of_all_rows_are_counted_together() -> None:
    samples = [
        {"right": 3, "words": 4, "there": 2, "found": 1, "hits": 1, "ok": False},
        {"right": 2, "words": 2, "there": 1, "found": 3, "hits": 1, "ok": True},
    ]
    found = further_scores("token-classification", samples, Bootstrap(resamples=100))
    assert found["token_classification.words"] == pytest.approx(5 / 6)
    assert found["token_classification.f1"] == pytest.approx(2 * 2 / (3 + 4))


def test_the_rank_of_ones_own_counts_ties_against_it() -> None:
    def sample(first: list[float], second: list[float], name: str) -> dict:
        return {"vectors": [first, second], "expected": name, "answer": "", "ok": False}

    x, y = [1.0, 0.0], [0.0, 1.0]
    found = rank_vectors([sample(x, x, "a"), sample(y, y, "b"), {"expected": "c", "ok": False, "answer": ""}])
    assert [one.get("rank") for one in found] == [1, 1, None] and [one["ok"] for one in found] == [True, True, False]
    assert further_scores("embedding", found, Bootstrap())["embedding.mrr"] == pytest.approx(2 / 3)
    same = rank_vectors([sample(x, x, "a"), sample(x, x, "b")])
    assert [one["rank"] for one in same] == [2, 2]  # vectors that are all alike find nothing
    crossed = rank_vectors([sample(x, y, "a"), sample(y, x, "b")])
    assert [one["answer"] for one in crossed] == ["b", "a"]
    assert all("vectors" not in one for one in [*found, *same]) and np.isfinite([one["rank"] for one in same]).all()
