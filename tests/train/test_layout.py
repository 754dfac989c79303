"""Packing: every kept target once per epoch, rows as they were promised, against a naive packer written here."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmctl.text.shards import SplitTokens
from llmctl.train import layout
from llmctl.train.data import TokenSource
from llmctl.train.params import TrainParams

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=40).filter(lambda sizes: max(sizes) > 1)
PACKINGS = ("documents", "best-fit", "crop", "none")


def split_of(lengths: list[int]) -> SplitTokens:
    """Every token is another one, so that each target names its place."""
    total = sum(lengths)
    return SplitTokens("train", np.arange(total, dtype=np.uint32), np.cumsum([0, *lengths]).astype(np.uint64), total)


def source_of(split: SplitTokens, packing: str, context: int = 16, mask: bool = True, **changes: object) -> TokenSource:
    return TokenSource(split, context, TrainParams(packing=packing, **{"batch_size": 4, **changes}), mask)


def naive_best_fit(sizes: list[int], room: int) -> list[int]:
    """How full the rows are, one piece after the other."""
    filled: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row, used in enumerate(filled) if used + size <= room]
        if fitting:
            filled[max(fitting, key=lambda row: filled[row])] += size
        else:
            filled.append(size)
    return filled


def naive_crop(sizes: list[int], room: int) -> list[list[int]]:
    """The sizes that are kept, row by row."""
    left, found = sorted(sizes), []
    while left:
        row: list[int] = []
        while left and sum(row) < room:
            free = room - sum(row)
            fitting = [size for size in left if size <= free]
            taken = max(fitting) if fitting else min(left)
            left.remove(taken)
            row.append(min(taken, free))
        found.append(row)
    return found


def epoch_of(source: TokenSource, epoch: int) -> list[list[tuple[int, int]]]:
    """(token read, target) of each row of an epoch."""
    found = []
    for place in range(source.size):
        batch = source.batch([(epoch, place)])
        tokens = batch.tokens.flatten()
        found.append(list(zip(tokens[batch.picks].tolist(), batch.targets.tolist(), strict=True)))
    return found


@given(LENGTHS, st.sampled_from(PACKINGS), st.booleans(), st.integers(8, 24), st.integers(0, 3))
def test_every_kept_target_comes_once_in_every_epoch(lengths, packing, mask, context, seed) -> None:
    split = split_of(lengths)
    source = source_of(split, packing, context, mask, seed=seed)
    starts = set(np.cumsum([0, *lengths]).tolist())
    possible = {token for token in range(sum(lengths)) if token not in starts}
    count = source.rows.count
    for epoch in (-1, 0, 1):
        pairs = [pair for row in epoch_of(source, epoch) for pair in row]
        assert all(target == token + 1 for token, target in pairs)  # the reader sees what comes before
        targets = [target for _, target in pairs]
        assert len(set(targets)) == len(targets) == count.targets and set(targets) <= possible
        assert count.dropped == len(possible) - len(targets)
        if packing != "crop":
            assert set(targets) == possible


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_best_fit_is_that_of_a_naive_packer(sizes) -> None:
    row, column = layout.best_fit(np.array(sizes), 16)
    filled = Counter(dict.fromkeys(row.tolist(), 0))
    places = set()
    for size, where, at in zip(sizes, row.tolist(), column.tolist(), strict=True):
        filled[where] += size
        assert at + size <= 16
        places |= {(where, place) for place in range(at, at + size)}
    assert len(places) == sum(sizes)  # no two pieces overlap
    assert sorted(filled.values()) == sorted(naive_best_fit(sizes, 16))
    assert all((0 in column[row == number]) for number in filled)  # no gap at the start


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_crop_is_that_of_a_naive_packer(sizes) -> None:
    row, column, kept = layout.crop(np.array(sizes), 16)
    expected = naive_crop(sizes, 16)
    found = [[0] * 0 for _ in expected]
    for number in np.lexsort((column, row)).tolist():
        if row[number] >= 0:
            found[row[number]].append(int(kept[number]))
    # Documents longer than a row are alike to us: which of them is cropped makes no difference to a row.
    assert found == expected
    assert all(sum(part) == 16 for part in found[:-1])


@pytest.mark.parametrize("packing", ["best-fit", "crop"])
def test_rows_begin_with_a_document_unless_it_is_longer_than_a_row(packing: str) -> None:
    lengths = np.random.default_rng(0).integers(2, 16, 80).tolist()
    split = split_of(lengths)
    starts = set(split.offsets.tolist())
    source = source_of(split, packing)
    assert all(row[0][0] in starts for row in epoch_of(source, 0))
    # Control: laid end to end, most rows begin inside a document.
    plain = epoch_of(source_of(split, "documents"), 0)
    assert sum(row[0][0] in starts for row in plain) < len(plain) / 2
    assert source_of(split, "documents").rows.count.cut > 10
    assert source.rows.count.cut == (0 if packing == "best-fit" else source.rows.count.cut)
    assert (source.rows.count.dropped == 0) == (packing == "best-fit")


@given(LENGTHS, st.sampled_from(PACKINGS[:3]))
def test_without_a_mask_the_targets_are_the_same(lengths, packing) -> None:
    split = split_of(lengths)
    masked, plain = source_of(split, packing), source_of(split, packing, mask=False)
    found = [Counter(target for row in epoch_of(source, 2) for _, target in row) for source in (masked, plain)]
    if packing != "crop":
        assert found[0] == found[1]
    batch = plain.batch([(0, place) for place in range(plain.size)])
    assert batch.documents is None and batch.positions is None


def test_a_mask_hides_the_documents_before_and_its_absence_does_not(make_model) -> None:
    model = make_model(vocab_size=64)
    split = split_of([9, 7, 9, 7, 9, 7])
    for mask in (True, False):
        batch = source_of(split, "best-fit", 15, mask).batch([(-1, 0)])
        changed = batch.tokens.clone()
        changed[:, 0] = 63
        hidden = [
            model.hidden(t, positions=batch.positions, documents=batch.documents) for t in (batch.tokens, changed)
        ]
        assert torch.equal(hidden[0][:, -1], hidden[1][:, -1]) == mask


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK", 100)
    monkeypatch.setattr(layout, "WINDOW", 3)


@pytest.mark.parametrize("packing", PACKINGS)
def test_blocks_and_windows_change_the_order_and_nothing_else(small_blocks, packing: str) -> None:
    lengths = np.random.default_rng(1).integers(0, 60, 90).tolist()
    split = split_of(lengths)
    source = source_of(split, packing)
    assert len(source.rows.cuts) > 20
    starts = set(np.cumsum([0, *lengths]).tolist())
    possible = {token for token in range(sum(lengths)) if token not in starts}
    orders = []
    for epoch in (-1, 0, 1):
        assert sorted(source.order(epoch).tolist()) == list(range(source.size))
        targets = [target for row in epoch_of(source, epoch) for _, target in row]
        assert len(set(targets)) == len(targets) == source.rows.count.targets
        assert packing == "crop" or set(targets) == possible
        orders.append(targets)
    assert orders[0] != orders[1] != orders[2]
    # Asked for in another order, by another object, after other epochs: the same rows.
    other = source_of(split, packing)
    for place in (source.size - 1, 3, 0):
        assert torch.equal(other.batch([(1, place)]).tokens, source.batch([(1, place)]).tokens)


@given(st.integers(1, 12), st.integers(0, 9), st.integers(1, 5), st.integers(0, 12))
def test_the_order_depends_on_seed_and_step_alone(ranks, step, batch, micro) -> None:
    """Not on the number of ranks, the micro-batch, or what was asked for before."""
    split = split_of(np.random.default_rng(2).integers(2, 50, 30).tolist())
    size = 4 * batch
    whole = source_of(split, "best-fit", batch_size=size)
    shared = source_of(split, "best-fit", batch_size=size, micro_batch=min(micro, size))
    shared.micro_batches(7)
    parts = [batch for rank in range(ranks) for batch in shared.micro_batches(step, rank, ranks)]
    found = torch.cat([part.tokens for part in parts])
    assert torch.equal(found, torch.cat([part.tokens for part in whole.micro_batches(step)]))
    assert sum(len(part.targets) for part in parts) == sum(len(part.targets) for part in whole.micro_batches(step))


def test_memory_does_not_grow_with_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK", 2000)

    def peaks(documents: int) -> tuple[int, int]:
        """Bytes for three steps of ours, and for a twin that holds every document's length and every row's place."""
        split = split_of([40] * documents)
        tracemalloc.start()
        source = source_of(split, "best-fit", 32)
        for step in (0, source.size // 8, 2):
            source.micro_batches(step)
        ours = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        held = np.diff(split.offsets.astype(np.int64)), np.random.default_rng(0).permutation(source.size)
        twin = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert len(held) == 2
        return ours, twin

    few, many = peaks(2000), peaks(20000)
    assert many[0] < 1.5 * few[0]
    assert many[1] > 8 * few[1]  # the control
