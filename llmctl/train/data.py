"""Where batches come from: sources whose every batch is a pure function of (seed, step), so that nothing but the step
has to be remembered to continue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from llmctl.errors import InputError
from llmctl.nn.attention import PADDING
from llmctl.text.remote_files import RemoteValues
from llmctl.text.shards import SplitTokens
from llmctl.train.batches import Batch, Example, Ints, pack
from llmctl.train.layout import IN_ORDER, Rows
from llmctl.train.params import TrainParams

Pick = tuple[int, int]
"""(epoch, place in that epoch's order); epoch -1 is the unshuffled order."""
SWEPT = 16
"""Sequences of a batch that is only measured, where `micro_batch` is found by trying: numbers must not depend on it,
nor on how many go through a pipeline at once."""


class Source(ABC):
    """`size` sequences per epoch, reshuffled every epoch, `batch_size` per step, `at_once` per forward pass."""

    def __init__(self, size: int, params: TrainParams) -> None:
        if size < 1:
            raise InputError("there is nothing to train on", hint="give more data")
        self.size, self.seed, self.packed = size, params.seed, params.packing != "none"
        self.batch_size, self.at_once = params.batch_size, params.sequences_at_once
        self.swept = min(self.at_once, SWEPT) if params.micro_batch == "auto" else self.at_once
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def steps_per_epoch(self) -> float:
        """Steps of one pass over the data; a step may span two epochs."""
        return self.size / self.batch_size

    def micro_batches(self, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The batch of `step` in parts of at most `at_once` sequences, or the share of one of several ranks.

        Shares are neighbouring, as equal as can be (empty where there are more ranks than sequences), and together
        the batch that one rank has. The `balance` of labels is that of the share.
        """
        first = step * self.batch_size
        start, end = (first + self.batch_size * part // ranks for part in (rank, rank + 1))
        picks = [divmod(index, self.size) for index in range(start, end)]
        return balanced([self.batch(picks[i : i + self.at_once]) for i in range(0, len(picks), self.at_once)])

    def sweep(self, limit: int | None = None) -> Iterator[Batch]:
        """One pass in order, or `limit` batches spread evenly over it."""
        starts = np.arange(0, self.size, self.swept)
        if limit is not None and limit < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(int)]
        for start in starts.tolist():
            yield self.batch([(IN_ORDER, i) for i in range(start, min(start + self.swept, self.size))])

    def heaviest(self) -> Batch:
        """The largest part of a batch that can come: of the longest sequences, as many as are computed at once."""
        order = np.argsort(-self.lengths(), kind="stable")
        return self.batch([(IN_ORDER, int(order[i % self.size])) for i in range(self.at_once)])

    def lengths(self) -> Ints:
        """How long each sequence is, in the unshuffled order; all alike unless a source says otherwise."""
        return np.ones(self.size, np.int64)

    def volume(self) -> int:
        """Tokens of one epoch that are learned from; what shares of a mixture are measured in."""
        return int(self.lengths().sum())

    @abstractmethod
    def batch(self, picks: Sequence[Pick]) -> Batch:
        """The sequences at `picks` as one batch."""

    def order(self, epoch: int) -> Ints:
        """Which sequence stands at each place of `epoch`."""
        return self._order(epoch)

    def _shuffled(self, epoch: int) -> Ints:
        if epoch == IN_ORDER:
            return np.arange(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)


def balanced(batches: list[Batch]) -> list[Batch]:
    """The micro-batches of a step with the `balance` of all of them together, however they are split."""
    if any(batch.labels is None for batch in batches):
        return batches
    labels = sum(len(batch.labels) for batch in batches if batch.labels is not None)
    return [replace(batch, balance=sum(len(batch.targets) for batch in batches) / labels) for batch in batches]


class JoinedSource(Source):
    """A source whose sequences are made one by one and then joined, so that several can be mixed."""

    def batch(self, picks: Sequence[Pick]) -> Batch:
        """The sequences at `picks`, joined in that order."""
        return self.join([self.item(epoch, place) for epoch, place in picks])

    @abstractmethod
    def item(self, epoch: int, place: int) -> Any:
        """One sequence, in the form that `join` takes."""

    @abstractmethod
    def join(self, items: Sequence[Any]) -> Batch:
        """A batch of sequences, which may come from several sources of one kind."""


class ExampleSource(JoinedSource):
    """Examples of any length, packed afresh for every forward pass; a sequence is one example."""

    def __init__(self, examples: Sequence[Example], length: int, params: TrainParams) -> None:
        super().__init__(len(examples), params)
        self.examples, self.length = examples, length

    def item(self, epoch: int, place: int) -> Example:
        """An example."""
        return self.examples[int(self.order(epoch)[place])]

    def join(self, items: Sequence[Example]) -> Batch:
        """Examples, packed; in that order in `Batch.owners`."""
        return pack(items, self.length, self.packed)

    def lengths(self) -> Ints:
        """Tokens of each example."""
        return np.array([len(example) for example in self.examples])


@dataclass(frozen=True)
class Row:
    """Pieces of documents that make a row, as in `layout.Layout`, and the tokens that they are of."""

    tokens: np.ndarray | RemoteValues
    column: Ints
    at: Ints
    length: Ints
    targets: Ints

    def pieces(self) -> Iterator[tuple[int, ...]]:
        """(column, place in the split, tokens, targets) of each piece."""
        return zip(*(part.tolist() for part in (self.column, self.at, self.length, self.targets)), strict=True)


class TokenSource(JoinedSource):
    """Rows of `context` tokens made of the documents of a split, others every epoch; see `layout.lay_out` for how.

    With `document_mask` a row is attended document by document with positions restarting, so nothing leaks between
    documents; without it a row is one sequence. The targets are the same.
    """

    def __init__(self, split: SplitTokens, context: int, params: TrainParams, document_mask: bool = True) -> None:
        self.split, self.context, self.document_mask = split, context, document_mask
        self.rows = Rows(split, context, params.packing, params.seed, closing=not document_mask)
        self._tokens = np.asarray(split.tokens) if isinstance(split.tokens, np.ndarray) else split.tokens
        super().__init__(len(self.rows), params)

    def item(self, epoch: int, place: int) -> Row:
        """A row."""
        layout, row = self.rows.at(epoch, place)
        pieces = slice(int(layout.first[row]), int(layout.first[row + 1]))
        parts = (layout.column[pieces], layout.at[pieces], layout.length[pieces], layout.targets[pieces])
        return Row(self._tokens, *parts)

    def heaviest(self) -> Batch:
        """Rows are alike: the first ones."""
        return self.batch([(IN_ORDER, i % self.size) for i in range(self.at_once)])

    def volume(self) -> int:
        """All targets."""
        return self.rows.count.targets

    def order(self, epoch: int) -> Ints:
        """The numbers of the rows in the order of an epoch."""
        return self.rows.order(epoch)

    def join(self, items: Sequence[Row]) -> Batch:
        """Documents and positions are left out where every row is a single document, or without `document_mask`."""
        if not self.packed:
            alone = [row.tokens[int(row.at[0]) : int(row.at[0] + row.targets[0]) + 1] for row in items]
            examples = [Example(ids.astype(np.int64), np.ones(len(ids), bool)) for ids in alone]
            return pack(examples, self.context, packed=False)
        shape = (len(items), self.context)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64)
        for row, read, aims in zip(items, tokens, targets, strict=True):
            for column, at, length, count in row.pieces():
                ids = row.tokens[at : at + max(length, count + 1)]
                read[column : column + length] = ids[:length]
                aims[column : column + count] = ids[1 : count + 1]
        chosen = np.flatnonzero(targets.reshape(-1) != PADDING)
        lengths = np.concatenate([row.length for row in items])
        single = len(lengths) == len(items) and bool((lengths == self.context).all())
        positions, documents = (None, None) if single or not self.document_mask else self._borders(items, lengths)
        return Batch(
            tokens=torch.from_numpy(tokens),
            picks=torch.from_numpy(chosen),
            targets=torch.from_numpy(targets.reshape(-1)[chosen]),
            positions=positions,
            documents=documents,
            size=int(lengths.sum()),
        )

    def _borders(self, items: Sequence[Row], lengths: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and documents `(rows, context)` of pieces of `lengths`; what no document reaches is padding."""
        first = np.concatenate([row.column + index * self.context for index, row in enumerate(items)])
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(first, lengths) + within
        shape = (len(items), self.context)
        positions, documents = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64)
        positions.reshape(-1)[places] = within
        documents.reshape(-1)[places] = np.repeat(np.concatenate([np.arange(len(r.length)) for r in items]), lengths)
        return torch.from_numpy(positions), torch.from_numpy(documents)
