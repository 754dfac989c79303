"""How the documents of a split become rows of a fixed length, and in which order those come.

Documents are taken in blocks, so that memory depends neither on their number nor on that of the rows. A block is laid
out when one of its rows is needed; rows are shuffled within windows of several blocks, and the blocks among themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmctl.errors import InputError
from llmctl.text.remote_files import RemoteValues
from llmctl.text.shards import SplitTokens

Ints = NDArray[np.int64]
Packing = Literal["documents", "best-fit", "crop", "none"]
IN_ORDER = -1
"""The epoch whose order is that of the data."""
BLOCK = 1 << 24
"""Tokens of a block, to the next end of a document. What is smaller than one is shuffled as a whole."""
WINDOW = 8
"""Blocks whose rows are shuffled together."""
DOCUMENTS, BLOCKS, ROWS = 1, 3, 4
"""Set the random numbers of one purpose apart from those of another."""


@dataclass(frozen=True)
class Layout:
    """Pieces of documents in rows, row by row."""

    first: Ints
    """`(R + 1,)`: row `i` holds the pieces `first[i]` to `first[i + 1]`."""
    at: Ints
    """`(P,)`, where the first token of each piece is in the split."""
    column: Ints
    """`(P,)`, where it is in its row."""
    length: Ints
    """`(P,)`, tokens that are read."""
    targets: Ints
    """`(P,)`, how many of them have a token to predict: the one after each in the split."""

    @classmethod
    def of(cls, rows: Ints, column: Ints, at: Ints, length: Ints, targets: Ints) -> Layout:
        """Pieces in any order, each with its row, every row used."""
        order = np.lexsort((column, rows))
        count = int(rows.max()) + 1 if len(rows) else 0
        first = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
        return cls(first, at[order], column[order], length[order], targets[order])

    def __len__(self) -> int:
        return len(self.first) - 1


def lay_out(starts: Ints, lengths: Ints, context: int, packing: Packing, closing: bool = False) -> Layout:
    """Rows of `context` tokens of the documents at `starts (D,)` of a split, `lengths (D,)` long.

    `documents` lays them end to end and cuts. `best-fit` cuts only documents longer than a row and puts every piece
    into the fullest row that has room for it, the longest first (2404.10830). `crop` begins every row with the start of
    a document and fills it: with the longest document that fits, or, when none does, with the beginning of the
    shortest that is left, whose rest is dropped. `none` gives each piece its row.

    Every token but a document's first is a target once, of what is kept. The last token of a document predicts
    nothing; it is read where documents are laid end to end and with `closing`, and takes no room otherwise.
    """
    if packing == "documents":
        return _end_to_end(starts, lengths, context)
    kept = lengths > 1
    starts, lengths = starts[kept], lengths[kept]
    if packing == "crop":
        rows, column, length = crop(lengths - (not closing), context)
        used = rows >= 0
        rows, column, length, lengths, starts = (part[used] for part in (rows, column, length, lengths, starts))
        return Layout.of(rows, column, starts, length, np.minimum(length, lengths - 1))
    counts = -(-(lengths - 1) // context)
    whose = np.repeat(np.arange(len(lengths)), counts)
    shift = (np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)) * context
    length = np.minimum(context, lengths[whose] - (not closing) - shift)
    targets = np.minimum(context, lengths[whose] - 1 - shift)
    rows, column = best_fit(length, context) if packing == "best-fit" else _one_each(length)
    return Layout.of(rows, column, starts[whose] + shift, length, targets)


def _end_to_end(starts: Ints, lengths: Ints, context: int) -> Layout:
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    edges = np.union1d(begins, np.arange(0, total, context))
    whose = np.searchsorted(begins, edges, side="right") - 1
    length = np.diff(edges, append=total)
    shift = edges - begins[whose]
    targets = np.minimum(length, lengths[whose] - 1 - shift)
    return Layout.of(edges // context, edges % context, starts[whose] + shift, length, targets)


def _one_each(sizes: Ints) -> tuple[Ints, Ints]:
    return np.arange(len(sizes)), np.zeros(len(sizes), np.int64)


def best_fit(sizes: Ints, room: int) -> tuple[Ints, Ints]:
    """(row, column) `(P,)` of pieces of `sizes` from 1 to `room`: the longest first, each into the fullest row it fits.

    Pieces of one size are placed together: the row that is fullest before one of them is so after it.
    """
    rows, column = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    free: dict[int, list[int]] = {}
    mask = count = 0  # bit n of the mask: there are rows with n free places
    order = np.argsort(-sizes, kind="stable")
    borders = np.flatnonzero(np.diff(sizes[order])) + 1
    for group in np.split(order, borders) if len(order) else []:
        size, at = int(sizes[group[0]]), 0
        while at < len(group):
            above = mask >> size
            left = size + (above & -above).bit_length() - 1 if above else room
            each = left // size
            needed = -(-(len(group) - at) // each)
            if above:
                taken = free[left][-needed:]
                del free[left][-needed:]
                mask ^= 0 if free[left] else 1 << left
            else:
                taken = list(range(count, count + needed))
                count += needed
            step = np.arange(min(len(group) - at, each * len(taken)))
            members = group[at : at + len(step)]
            rows[members] = np.array(taken)[step // each]
            column[members] = room - left + step % each * size
            full, rest = divmod(len(step), each)
            for remaining, which in ((left - each * size, taken[:full]), (left - rest * size, taken[full : full + 1])):
                if remaining and which:
                    free.setdefault(remaining, []).extend(which)
                    mask |= 1 << remaining
            at += len(step)
    return rows, column


def crop(sizes: Ints, room: int) -> tuple[Ints, Ints, Ints]:
    """(row, column, kept size) `(D,)` of documents of `sizes` from 1 on; all rows are full but the last."""
    rows, column, kept = (np.full(len(sizes), -1, np.int64) for _ in range(3))
    left: dict[int, list[int]] = {}
    for number, size in enumerate(np.minimum(sizes, room + 1).tolist()):  # what never fits is alike
        left.setdefault(size, []).append(number)
    mask = sum(1 << size for size in left)
    row = 0
    while mask:
        free = room
        while free and mask:
            fitting = mask & ((2 << free) - 1)
            size = fitting.bit_length() - 1 if fitting else (mask & -mask).bit_length() - 1
            number = left[size].pop()
            mask ^= 0 if left[size] else 1 << size
            rows[number], column[number], kept[number] = row, room - free, min(size, free)
            free -= min(size, free)
        row += 1
    return rows, column, kept


@dataclass(frozen=True)
class Count:
    """What an epoch holds; the same in every epoch."""

    rows: int
    tokens: int
    """That are read."""
    targets: int
    dropped: int
    """Targets of the documents that no row has."""
    documents: int
    cut: int
    """Documents that are in more than one row, or not whole."""


class Rows:
    """All rows of a split, in the order of every epoch: row `place` of `epoch` is a function of the seed and these."""

    def __init__(self, split: SplitTokens, context: int, packing: Packing, seed: int, closing: bool = False) -> None:
        self.split, self.context, self.packing, self.seed, self.closing = split, context, packing, seed, closing
        every = np.arange(0, len(split.tokens), BLOCK).astype(split.offsets.dtype)
        cuts = np.searchsorted(split.offsets, every)
        self.cuts = np.unique(np.concatenate([[0], cuts, [len(split)]])).astype(np.int64)
        counts = list(self._count())
        self.count = Count(*(sum(part) for part in zip(*counts, strict=True))) if counts else Count(0, 0, 0, 0, 0, 0)
        if not self.count.targets:
            raise InputError(f"the split `{split.name}` has no document of two tokens", hint="give more text")
        self.ends = np.cumsum([rows for rows, *_ in counts])
        """`(blocks,)`, one after the last row of each."""
        self._layout = lru_cache(maxsize=2 * WINDOW + 1)(self._lay_out)
        self._window = lru_cache(maxsize=3)(self._shuffle_window)
        self._blocks = lru_cache(maxsize=3)(self._order_blocks)

    def __len__(self) -> int:
        return self.count.rows

    def at(self, epoch: int, place: int) -> tuple[Layout, int]:
        """The layout that holds a row, and the row's number in it."""
        _, ends = self._blocks(epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        before = int(ends[window - 1]) if window else 0
        number = int(self._window(epoch, window)[place - before])
        block = int(np.searchsorted(self.ends, number, side="right"))
        return self._layout(epoch, block), number - (int(self.ends[block - 1]) if block else 0)

    def order(self, epoch: int) -> Ints:
        """`(rows,)`, the numbers of all rows in the order of an epoch; for small splits."""
        windows = len(self._blocks(epoch)[1])
        return np.concatenate([self._window(epoch, window) for window in range(windows)])

    def _documents(self, block: int) -> tuple[Ints, Ints]:
        offsets = self.split.offsets[self.cuts[block] : self.cuts[block + 1] + 1].astype(np.int64)
        return offsets[:-1], np.diff(offsets)

    def _count(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """The fields of `Count`, block by block. They follow from the lengths alone, not from the order."""
        for block in range(len(self.cuts) - 1):
            starts, lengths = self._documents(block)
            made = lay_out(starts, lengths, self.context, self.packing, self.closing)
            targets, possible = int(made.targets.sum()), np.maximum(lengths - 1, 0)
            whole = np.isin(made.targets + made.at, (starts + possible)[possible > 0]) & np.isin(made.at, starts)
            cut = int((possible > 0).sum() - (whole & (made.targets > 0)).sum())
            read = int(made.length.sum())
            yield len(made), read, targets, int(possible.sum()) - targets, len(lengths), cut

    def _order_blocks(self, epoch: int) -> tuple[Ints, Ints]:
        """(blocks in the order of `epoch`, one after the last row of each window)."""
        blocks = np.arange(len(self.ends))
        if epoch != IN_ORDER and len(blocks) > 1:
            blocks = np.random.default_rng([self.seed, epoch, BLOCKS]).permutation(blocks)
        ends = np.cumsum(np.diff(self.ends, prepend=0)[blocks])
        return blocks, ends[np.minimum(np.arange(WINDOW - 1, len(ends) + WINDOW - 1, WINDOW), len(ends) - 1)]

    def _shuffle_window(self, epoch: int, window: int) -> Ints:
        blocks, _ = self._blocks(epoch)
        begins = np.concatenate([[0], self.ends])
        mine = blocks[window * WINDOW : (window + 1) * WINDOW]
        numbers = np.concatenate([np.arange(begins[block], begins[block + 1]) for block in mine])
        if epoch == IN_ORDER:
            return numbers
        self._expect(blocks[(window + 1) * WINDOW : (window + 2) * WINDOW])
        return numbers[np.random.default_rng(_key(self.seed, epoch, ROWS, window)).permutation(len(numbers))]

    def _expect(self, blocks: Ints) -> None:
        """Have the tokens of the next window fetched, where they lie elsewhere."""
        if isinstance(self.split.tokens, RemoteValues):
            for block in blocks.tolist():
                first, last = self.split.offsets[self.cuts[block : block + 2]].tolist()
                self.split.tokens.expect(first, last)

    def _lay_out(self, epoch: int, block: int) -> Layout:
        starts, lengths = self._documents(block)
        if epoch != IN_ORDER and self.packing != "none":  # rows of one piece are shuffled as such
            order = np.random.default_rng(_key(self.seed, epoch, DOCUMENTS, block)).permutation(len(starts))
            starts, lengths = starts[order], lengths[order]
        return lay_out(starts, lengths, self.context, self.packing, self.closing)


def _key(seed: int, epoch: int, purpose: int, number: int) -> list[int]:
    """What random numbers are made from. Those of the first block and window know no blocks."""
    if number:
        return [seed, epoch, purpose, number]
    return [seed, epoch, DOCUMENTS] if purpose == DOCUMENTS else [seed, epoch]
