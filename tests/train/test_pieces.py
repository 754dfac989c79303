from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from llmctl.errors import InputError
from llmctl.text.shards import SplitTokens
from llmctl.train import corruption
from llmctl.train.batches import PADDING, Batch, Piece, lay_out
from llmctl.train.masking import Vocabulary, span_lengths
from llmctl.train.params import TrainParams
from llmctl.train.pieces import CorruptionSource, Frame, MaskedSource, Masking, NextSentenceSource, PrefixSource

VOCAB, CLS, SEP, MASK, EOS = 200, 1, 2, 3, 1
FRAME = Frame([CLS], [SEP])
SENTINELS = list(range(199, 179, -1))
LENGTHS = (3, 41, 17, 9, 120, 2, 1, 0, 64)


@pytest.fixture
def vocabulary() -> Vocabulary:
    special = np.arange(VOCAB) < 4
    return Vocabulary(MASK, np.arange(4, VOCAB), special, (np.zeros(VOCAB, bool), ~special))


@pytest.fixture
def split(make_split) -> SplitTokens:
    """Documents whose tokens tell them apart: document d holds 10 d + 4 to 10 d + 13."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(10 * d + 4, 10 * d + 14, length).tolist() for d, length in enumerate(LENGTHS)]
    return make_split([[CLS, *text, SEP] for text in texts], VOCAB)


def params(**changes: object) -> TrainParams:
    return TrainParams(**{"batch_size": 4, "max_steps": 8, **changes})


def texts(split: SplitTokens) -> list[list[int]]:
    return [split.document(d)[1:-1].tolist() for d in range(len(split))]


def equal(one: Batch, other: Batch) -> bool:
    def same(name: str) -> bool:
        a, b = getattr(one, name), getattr(other, name)
        return a is b if a is None or b is None else torch.equal(a, b)

    return all(same(n) for n in ("tokens", "picks", "targets", "segments", "labels", "boundaries", "source", "prefix"))


def unmasked(batch: Batch) -> np.ndarray:
    """The batch's tokens with its targets put back."""
    tokens = batch.tokens.numpy().copy().reshape(-1)
    tokens[batch.picks.numpy()] = batch.targets.numpy()
    return tokens.reshape(batch.tokens.shape)


def rows_of(batch: Batch) -> list[list[int]]:
    """Each sequence of a batch, without its masks."""
    tokens, documents = unmasked(batch), batch.documents
    if documents is None:
        return [np.trim_zeros(row, "b").tolist() for row in tokens]
    ids = documents.numpy()
    return [tokens[ids == number].tolist() for number in range(int(ids.max()) + 1)]


MAKERS: dict[str, Callable] = {
    "masked": lambda split, v, p: MaskedSource(split, FRAME, 32, p, Masking(v, 0.15)),
    "static": lambda split, v, p: MaskedSource(split, FRAME, 32, p, Masking(v, 0.15), fixed=True),
    "span": lambda split, v, p: MaskedSource(split, FRAME, 32, p, Masking(v, 0.15, span_lengths(0.2, 10))),
    "pairs": lambda split, v, p: NextSentenceSource(split, FRAME, 32, p, Masking(v, 0.15)),
    "corruption": lambda split, v, p: CorruptionSource(split, Frame([], [EOS]), 32, p, SENTINELS, 0, 0.15, 3.0),
    "prefix": lambda split, v, p: PrefixSource(split, FRAME, 32, p),
    "prefix pairs": lambda split, v, p: PrefixSource(split, Frame([], [EOS]), 32, p, start=0),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_is_a_function_of_seed_and_step(split, vocabulary, name: str) -> None:
    one, again = (MAKERS[name](split, vocabulary, params(seed=3)) for _ in range(2))
    other = MAKERS[name](split, vocabulary, params(seed=4))
    far = list(range(12))
    for step in far:
        one.micro_batches(step)
    for step in reversed(far):  # in any order
        for a, b in zip(one.micro_batches(step), again.micro_batches(step), strict=True):
            assert equal(a, b)
    assert not equal(one.micro_batches(0)[0], other.micro_batches(0)[0])
    assert all(equal(a, b) for a, b in zip(one.sweep(), again.sweep(), strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_micro_batches_hold_what_the_whole_batch_holds(split, vocabulary, name: str) -> None:
    whole = MAKERS[name](split, vocabulary, params(batch_size=6)).micro_batches(1)
    parts = MAKERS[name](split, vocabulary, params(batch_size=6, micro_batch=2)).micro_batches(1)
    assert (len(whole), len(parts)) == (1, 3)
    assert sorted(whole[0].targets.tolist()) == sorted(t for part in parts for t in part.targets.tolist())
    assert sorted(map(tuple, rows_of(whole[0]))) == sorted(tuple(row) for part in parts for row in rows_of(part))
    assert {part.balance for part in parts} == {whole[0].balance}
    if name == "pairs":
        assert whole[0].balance == len(whole[0].targets) / 6


def test_masked_pieces_are_framed_and_lose_no_text(split, vocabulary) -> None:
    source = MAKERS["masked"](split, vocabulary, params())
    rows = [row for batch in source.sweep() for row in rows_of(batch)]
    assert all(row[0] == CLS and row[-1] == SEP and len(row) <= 32 for row in rows)
    assert [t for row in rows for t in row[1:-1]] == [t for text in texts(split) for t in text]
    for batch in source.sweep():
        assert not vocabulary.special[batch.targets.numpy()].any()
    # Packed or one to a row: the same sequences and masks.
    alone = MAKERS["masked"](split, vocabulary, params(packing="none"))
    assert any(a.tokens.shape[0] < b.tokens.shape[0] for a, b in zip(source.sweep(), alone.sweep(), strict=True))
    for one, other in zip(source.sweep(), alone.sweep(), strict=True):
        assert one.tokens.shape[0] <= other.tokens.shape[0]
        assert rows_of(one) == rows_of(other) and one.targets.tolist() == other.targets.tolist()


def masks_of_epoch(source: MaskedSource, epoch: int) -> dict[tuple[int, ...], frozenset[int]]:
    """Masked places of every piece."""
    found = {}
    for place in range(source.size):
        batch = source.batch([(epoch, place)])
        found[tuple(unmasked(batch)[0].tolist())] = frozenset(batch.picks.tolist())
    return found


def overlap(source: MaskedSource) -> float:
    first, second = masks_of_epoch(source, 0), masks_of_epoch(source, 1)
    assert first.keys() == second.keys()
    return sum(len(first[row] & second[row]) for row in first) / sum(len(places) for places in first.values())


def test_dynamic_masks_of_two_epochs_overlap_by_chance_and_static_ones_wholly(make_split, vocabulary) -> None:
    rng = np.random.default_rng(1)
    split = make_split([[CLS, *rng.integers(4, VOCAB, 510).tolist(), SEP] for _ in range(40)], VOCAB)
    masks = Masking(vocabulary, 0.15)
    dynamic, static = (MaskedSource(split, FRAME, 512, params(), masks, fixed=fixed) for fixed in (False, True))
    assert overlap(dynamic) == pytest.approx(0.15, abs=0.02)  # .154 of transformers' collator over ten times as much
    assert overlap(static) == 1.0


def test_pairs_follow_each_other_in_half_of_the_cases(make_split, vocabulary) -> None:
    rng = np.random.default_rng(0)
    made = [rng.integers(4, VOCAB, 60).tolist() for _ in range(40)]
    split = make_split([[CLS, *text, SEP] for text in made], VOCAB)
    source = NextSentenceSource(split, FRAME, 33, params(packing="none"), Masking(vocabulary, 0.15))
    whole = ["".join(map(chr, text)) for text in made]
    labels = []
    for epoch in range(10):
        for place in range(source.size):
            batch = source.batch([(epoch, place)])
            row, segments = unmasked(batch)[0], batch.segments.numpy()[0]
            row, segments = (row, segments) if batch.documents is None else (row[batch.documents.numpy()[0] == 0],) * 2
            first, second = parts_of(row)
            text = "".join(map(chr, [*first, *second]))
            label = int(batch.labels[0])
            if len(second) > 3:  # fewer tokens may follow by chance
                assert (label == 0) == any(text in document for document in whole)
            assert any("".join(map(chr, second)) in document for document in whole)
            assert len(first) + len(second) == 30
            types = batch.segments.numpy()[0][: len(row)]
            assert types.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
            labels.append(label)
    assert binomtest(sum(labels), len(labels), 0.5).pvalue > 1e-3


def parts_of(row: np.ndarray) -> tuple[list[int], list[int]]:
    ids = row.tolist()
    assert ids[0] == CLS and ids[-1] == SEP and ids.count(SEP) == 2
    middle = ids.index(SEP)
    return ids[1:middle], ids[middle + 1 : -1]


def test_a_wrong_next_sentence_comes_from_another_document(split, vocabulary) -> None:
    source = MAKERS["pairs"](split, vocabulary, params())
    for document in (1, 4, 8):
        for seed in range(60):
            part = source.elsewhere(document, 30, np.random.default_rng(seed))
            owner = (int(part[0]) - 4) // 10
            assert owner != document and len(part) == 30
            assert set((part - 4) // 10) == {owner}
    assert len(source.elsewhere(4, 100, np.random.default_rng(0))) == 64  # the longest other


def test_one_document_has_no_other_one(make_split, vocabulary) -> None:
    split = make_split([[CLS, *range(4, 40), SEP]], VOCAB)
    with pytest.raises(InputError, match="one document"):
        NextSentenceSource(split, FRAME, 32, params(), Masking(vocabulary, 0.15))
    with pytest.raises(InputError, match="no document of 2 tokens"):
        PrefixSource(make_split([[CLS]], VOCAB), Frame([], []), 32, params())


def test_corrupted_pieces_rebuild_the_text(split, vocabulary) -> None:
    own = split_frame_free(split)
    source = CorruptionSource(own, Frame([], [SEP]), 32, params(packing="none"), SENTINELS, 0, 0.15, 3.0)
    found = []
    for place in range(source.size):
        batch = source.batch([(0, int(np.flatnonzero(source.order(0) == place)[0]))])
        assert batch.tokens[0, 0] == 0 and batch.source.shape[1] <= 32
        read = [t for t in batch.source[0].tolist() if t != 0]
        said = batch.targets.tolist()
        assert read[-1] == said[-1] == SEP
        assert batch.tokens[0, 1 : len(said)].tolist() == said[:-1]
        found += corruption.restore(read[:-1], said[:-1], SENTINELS)
    documents = [own.document(d)[:-1].tolist() for d in range(len(own))]
    assert found == [t for text in documents if len(text) > 1 for t in text]


def split_frame_free(split: SplitTokens) -> SplitTokens:
    """The documents with EOS alone, as T5's tokenizer frames them."""
    parts = [split.document(d)[1:] for d in range(len(split))]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return SplitTokens("train", np.concatenate(parts), offsets, 0)


def test_a_prefix_is_read_both_ways_and_only_the_rest_is_predicted(split) -> None:
    source = PrefixSource(split, FRAME, 32, params(packing="none"))
    cuts = []
    for place in range(source.size):
        batch = source.batch([(0, place)])
        prefix = batch.prefix[0].numpy()
        cut = int(prefix.sum())
        assert prefix[:cut].all() and batch.picks.tolist() == list(range(cut - 1, cut - 1 + len(batch.targets)))
        following = [*batch.tokens[0, cut : cut + len(batch.targets) - 1].tolist(), int(batch.targets[-1])]
        assert batch.targets.tolist() == following
        cuts.append(cut)
    assert len(set(cuts)) > 2
    # With an encoder the first part goes there.
    batch = PrefixSource(split, Frame([], [SEP]), 32, params(), start=0).batch([(0, 0), (0, 1)])
    assert batch.prefix is None and batch.source is not None


def test_sources_are_packed_with_their_targets() -> None:
    rng = np.random.default_rng(0)
    sizes = [(5, 9), (12, 3), (4, 4), (8, 8), (2, 14)]
    pieces = [
        Piece(rng.integers(1, 9, t), np.arange(t), rng.integers(1, 9, t), source=rng.integers(1, 9, s))
        for t, s in sizes
    ]
    batch = lay_out(pieces, 128)
    assert batch.tokens.shape[0] == batch.source.shape[0] == 1
    for number, piece in enumerate(pieces):
        assert batch.tokens[batch.documents == number].tolist() == piece.ids.tolist()
        assert batch.source[batch.source_documents == number].tolist() == piece.source.tolist()
    long = [Piece(p.ids.repeat(10), p.places, p.targets, source=p.source.repeat(9)) for p in pieces]
    batch = lay_out(long, 128)
    for number, piece in enumerate(long):
        row = (batch.documents == number).any(1)
        assert (row == (batch.source_documents == number).any(1)).all() and row.sum() == 1
        assert batch.source[batch.source_documents == number].tolist() == piece.source.tolist()
    alone = lay_out(pieces, 16, packed=False)
    assert alone.documents is None and alone.tokens.shape == (5, 16)
    assert (alone.source_documents == PADDING).sum() == 5 * 16 - sum(s for _, s in sizes)


def test_boundaries_point_at_the_outer_tokens_in_a_packed_row(split, vocabulary) -> None:
    source = MAKERS["span"](split, vocabulary, params())
    batch = source.batch([(0, place) for place in range(source.size)])
    documents = batch.documents.numpy().reshape(-1)
    masked = np.isin(np.arange(len(documents)), batch.picks.numpy())
    for place, (left, right, offset) in zip(batch.picks.tolist(), batch.boundaries.tolist(), strict=True):
        assert left + 1 + offset == place < right
        assert documents[left] == documents[place] == documents[right]
        assert not masked[left] and not masked[right] and masked[left + 1 : right].all()
