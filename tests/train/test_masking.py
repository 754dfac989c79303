from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare

from llmctl.train.masking import (
    Vocabulary,
    boundaries,
    choose_spans,
    choose_tokens,
    hide_spans,
    hide_tokens,
    span_lengths,
)

VOCAB, SPECIAL = 1000, 5
ROWS, LENGTH = 400, 512
MASK = 4


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    special = np.arange(VOCAB) < SPECIAL
    # Ids from 500 on continue a word that is still open.
    joins = (np.arange(VOCAB) >= 500, ~special)
    return Vocabulary(MASK, np.arange(SPECIAL, VOCAB), special, joins)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """400 rows of 512, framed by special tokens, the last tenth of each row padding."""
    ids = np.random.default_rng(0).integers(SPECIAL, VOCAB, (ROWS, LENGTH))
    ids[:, 0] = 1
    ids[:, 460] = 2
    ids[:, 461:] = 0
    return ids


def mask_all(rows: np.ndarray, vocabulary: Vocabulary, draw: int) -> tuple[np.ndarray, np.ndarray]:
    chosen, hidden = np.zeros(rows.shape, bool), rows.copy()
    for number, ids in enumerate(rows):
        rng = np.random.default_rng([0, draw, number])
        chosen[number] = choose_tokens(~vocabulary.special[ids], 0.15, rng)
        hidden[number] = hide_tokens(ids, chosen[number], vocabulary, rng)
    return chosen, hidden


def shares(chosen: np.ndarray, hidden: np.ndarray, rows: np.ndarray) -> tuple[int, int, int]:
    """(chosen, of these masked, of these as they were)."""
    return int(chosen.sum()), int((hidden == MASK).sum()), int((chosen & (hidden == rows)).sum())


def within(hits: int, of: int, share: float) -> bool:
    return binomtest(hits, of, share).pvalue > 1e-3


def test_token_masking_has_the_statistics_of_transformers_collator(vocabulary: Vocabulary) -> None:
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
    from transformers import set_seed as seed_all

    rows = np.random.default_rng(1).integers(SPECIAL, VOCAB, (ROWS, LENGTH))
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(VOCAB)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, mask_token=f"w{MASK}", pad_token="w0")
    seed_all(0)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    theirs, labels = collator.torch_mask_tokens(torch.tensor(rows), torch.zeros(rows.shape, dtype=torch.bool))
    their_chosen = (labels != -100).numpy()
    expected = shares(their_chosen, theirs.numpy(), rows)
    found = shares(*mask_all(rows, vocabulary, 1), rows)
    for count, masked, kept in (expected, found):
        assert within(count, rows.size, 0.15)
        assert within(masked, count, 0.8)
        assert within(kept, count, 0.1 + 0.1 / VOCAB)
    # Another rule must fail these bounds: 12 % chosen, or 90 % masked.
    assert not within(round(0.12 * rows.size), rows.size, 0.15)
    assert not within(round(0.9 * found[0]), found[0], 0.8)


def test_special_tokens_and_padding_are_never_masked_and_do_not_count(vocabulary: Vocabulary, rows: np.ndarray) -> None:
    chosen, hidden = mask_all(rows, vocabulary, 0)
    assert not chosen[vocabulary.special[rows]].any()
    assert (hidden[~chosen] == rows[~chosen]).all()
    assert (chosen.sum(axis=1) == round(0.15 * 459)).all()  # of the real tokens, not of 512
    random = hidden[chosen & (hidden != MASK)]
    assert not vocabulary.special[random].any()


def test_two_dynamic_draws_overlap_as_chance_has_it(vocabulary: Vocabulary, rows: np.ndarray) -> None:
    first, second, again = (mask_all(rows, vocabulary, draw)[0] for draw in (1, 2, 1))
    assert within(int((first & second).sum()), int(first.sum()), 0.15)
    assert (first == again).all()  # the control: a static mask overlaps itself wholly


def test_short_sequences_get_a_mask_and_empty_ones_none(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    assert choose_tokens(np.array([False, True, False]), 0.15, rng).tolist() == [False, True, False]
    assert not choose_tokens(np.zeros(4, bool), 0.15, rng).any()
    assert choose_spans(np.zeros(4, bool), np.arange(4), 0.15, span_lengths(0.2, 10), rng) == []
    assert choose_spans(np.array([False, True, False]), np.arange(3), 0.15, span_lengths(0.2, 10), rng) == [(1, 2)]


def test_span_lengths_are_the_cut_geometric_distribution() -> None:
    lengths = span_lengths(0.2, 10)
    assert lengths @ np.arange(1, 11) == pytest.approx(3.797, abs=5e-4)
    assert lengths[1:] / lengths[:-1] == pytest.approx(np.full(9, 0.8))


def spans_of(rows: np.ndarray, vocabulary: Vocabulary, words: bool) -> list[list[tuple[int, int]]]:
    found = []
    for number, ids in enumerate(rows):
        rng = np.random.default_rng([0, 1, number])
        units = vocabulary.words(ids) if words else np.arange(len(ids))
        found.append(choose_spans(~vocabulary.special[ids], units, 0.15, span_lengths(0.2, 10), rng))
    return found


def test_spans_have_the_drawn_lengths_and_the_budgeted_share(vocabulary: Vocabulary, rows: np.ndarray) -> None:
    spans = spans_of(rows, vocabulary, words=False)
    lengths = np.array([end - start for row in spans for start, end in row])
    counts = np.bincount(lengths, minlength=11)[1:]
    assert chisquare(counts, span_lengths(0.2, 10) * len(lengths)).pvalue > 0.01
    assert abs(lengths.mean() - 3.797) < 3 * lengths.std() / len(lengths) ** 0.5
    assert lengths.sum() / (ROWS * 459) == pytest.approx(0.15, abs=0.002)
    for ids, row in zip(rows, spans, strict=True):
        assert all(not vocabulary.special[ids[start:end]].any() for start, end in row)
        assert all(before[1] < after[0] for before, after in zip(row, row[1:], strict=False))
    # The control: single tokens that happen to stand side by side.
    chosen, _ = mask_all(rows, vocabulary, 1)
    runs = int((np.diff(chosen.astype(int), axis=1, prepend=0) == 1).sum())
    assert chosen.sum() / runs == pytest.approx(1 / 0.85, abs=0.03)


def test_spans_of_words_never_cut_a_word(vocabulary: Vocabulary, rows: np.ndarray) -> None:
    spans = spans_of(rows, vocabulary, words=True)
    in_words = []
    for ids, row in zip(rows, spans, strict=True):
        words = vocabulary.words(ids)
        for start, end in row:
            assert words[start - 1] != words[start] and words[end - 1] != words[end]
            in_words.append(len(set(words[start:end])))
    assert abs(np.mean(in_words) - 3.797) < 3 * np.std(in_words) / len(in_words) ** 0.5
    # The control: spans of tokens do cut words.
    cut = [
        vocabulary.words(ids)[start - 1] == vocabulary.words(ids)[start]
        for ids, row in zip(rows[:20], spans_of(rows[:20], vocabulary, words=False), strict=True)
        for start, _ in row
    ]
    assert any(cut)


def test_a_span_is_hidden_as_one(vocabulary: Vocabulary, rows: np.ndarray) -> None:
    lots = {"masked": 0, "kept": 0, "random": 0}
    for number, (ids, spans) in enumerate(zip(rows, spans_of(rows, vocabulary, words=False), strict=True)):
        hidden = hide_spans(ids, spans, vocabulary, np.random.default_rng([3, number]))
        for start, end in spans:
            part = hidden[start:end]
            kind = "masked" if (part == MASK).all() else "kept" if (part == ids[start:end]).all() else "random"
            assert kind == "masked" or MASK not in part
            lots[kind] += 1
        outside = np.ones(len(ids), bool)
        for start, end in spans:
            outside[start:end] = False
        assert (hidden[outside] == ids[outside]).all()
    total = sum(lots.values())
    assert within(lots["masked"], total, 0.8)
    assert within(lots["kept"], total, 0.1) and within(lots["random"], total, 0.1)


def test_boundaries_are_the_tokens_outside_the_span() -> None:
    places, edges = boundaries([(3, 5), (8, 9)])
    assert places.tolist() == [3, 4, 8]
    assert edges.tolist() == [[2, 5, 0], [2, 5, 1], [7, 9, 0]]
