"""Where batches come from: sources whose every batch is a pure function of (seed, step), so that nothing but the step
has to be remembered to continue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from llmctl.errors import InputError
from llmctl.nn.attention import PADDING
from llmctl.text.shards import SplitTokens
from llmctl.train.batches import Batch, Example, Ints, pack
from llmctl.train.params import TrainParams

Pick = tuple[int, int]
"""(epoch, place in that epoch's order); epoch -1 is the unshuffled order."""
IN_ORDER = -1
SWEPT = 16
"""Sequences of a batch that is only measured, where `micro_batch` is found by trying: numbers must not depend on it."""


class Source(ABC):
    """`size` sequences per epoch, reshuffled every epoch, `batch_size` per step, `at_once` per forward pass."""

    def __init__(self, size: int, params: TrainParams) -> None:
        if size < 1:
            raise InputError("there is nothing to train on", hint="give more data")
        self.size, self.seed, self.packed = size, params.seed, params.packing == "documents"
        self.batch_size, self.at_once = params.batch_size, params.sequences_at_once
        self.swept = min(self.at_once, SWEPT) if params.micro_batch == "auto" else self.at_once
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def steps_per_epoch(self) -> float:
        """Steps of one pass over the data; a step may span two epochs."""
        return self.size / self.batch_size

    def micro_batches(self, step: int) -> list[Batch]:
        """The batch of `step` in parts of at most `at_once` sequences."""
        first = step * self.batch_size
        picks = [divmod(index, self.size) for index in range(first, first + self.batch_size)]
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


class ExampleSource(Source):
    """Examples of any length, packed afresh for every forward pass; a sequence is one example."""

    def __init__(self, examples: Sequence[Example], length: int, params: TrainParams) -> None:
        super().__init__(len(examples), params)
        self.examples, self.length = examples, length

    def batch(self, picks: Sequence[Pick]) -> Batch:
        """The examples at `picks`, in that order in `Batch.owners`."""
        chosen = [self.examples[self.order(epoch)[place]] for epoch, place in picks]
        return pack(chosen, self.length, self.packed)

    def lengths(self) -> Ints:
        """Tokens of each example."""
        return np.array([len(example) for example in self.examples])


@dataclass(frozen=True)
class _Stream:
    """One epoch's documents laid end to end: their order, where each starts, and the order of the rows."""

    documents: Ints
    starts: Ints
    rows: Ints


class TokenSource(Source):
    """Rows of `context` tokens cut from the documents of a split laid end to end in a new order every epoch.

    Each row is attended document by document with positions restarting, so nothing leaks between documents; every token
    but a document's first is a target exactly once per epoch. With `packing: none` a row is (a piece of) one document.
    """

    def __init__(self, split: SplitTokens, context: int, params: TrainParams) -> None:
        self.split, self.context = split, context
        self._lengths = np.diff(split.offsets.astype(np.int64))
        # Unpacked: pieces of each document, cut so that every target has its row.
        self._pieces = np.maximum(0, -(-(self._lengths - 1) // context))
        rows = -(-len(split.tokens) // context)
        if not np.any(self._lengths > 1):
            raise InputError(f"the split `{split.name}` has no document of two tokens", hint="give more text")
        super().__init__(rows if params.packing == "documents" else int(self._pieces.sum()), params)
        self._stream = lru_cache(maxsize=2)(self._lay_out)

    def batch(self, picks: Sequence[Pick]) -> Batch:
        """The rows at `picks`; documents and positions are left out where every row is a single document."""
        if not self.packed:
            return pack([self._piece(epoch, place) for epoch, place in picks], self.context, packed=False)
        shape = (len(picks), self.context)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets, documents = np.full(shape, PADDING, np.int64), np.full(shape, PADDING, np.int64)
        for row, (epoch, place) in enumerate(picks):
            self._fill(epoch, place, tokens[row], targets[row], positions[row], documents[row])
        chosen = np.flatnonzero(targets.reshape(-1) != PADDING)
        alone = not documents[:, -1].any()
        return Batch(
            tokens=torch.from_numpy(tokens),
            picks=torch.from_numpy(chosen),
            targets=torch.from_numpy(targets.reshape(-1)[chosen]),
            positions=None if alone else torch.from_numpy(positions),
            documents=None if alone else torch.from_numpy(documents),
            size=int((documents != PADDING).sum()),
        )

    def _lay_out(self, epoch: int) -> _Stream:
        documents = np.arange(len(self._lengths))
        if epoch != IN_ORDER:
            documents = np.random.default_rng([self.seed, epoch, 1]).permutation(documents)
        starts = np.concatenate([[0], np.cumsum(self._lengths[documents])])
        return _Stream(documents, starts, self.order(epoch))

    def _fill(self, epoch: int, place: int, tokens: Ints, targets: Ints, positions: Ints, documents: Ints) -> None:
        """Write one row; what no document reaches stays padding."""
        stream = self._stream(epoch)
        at = int(stream.rows[place]) * self.context
        end = at + self.context
        index = int(np.searchsorted(stream.starts, at, side="right")) - 1
        column = number = 0
        while column < self.context and index < len(stream.documents):
            start, stop = int(stream.starts[index]), int(stream.starts[index + 1])
            ids = self.split.document(int(stream.documents[index]))[at - start : min(stop, end + 1) - start]
            here = slice(column, column + min(stop, end) - at)
            tokens[here] = ids[: here.stop - column]
            targets[column : column + len(ids) - 1] = ids[1:]
            positions[here] = np.arange(here.stop - column)
            documents[here] = number
            at, column, index, number = stop, here.stop, index + 1, number + (stop > at)

    def _piece(self, epoch: int, place: int) -> Example:
        number = int(self.order(epoch)[place])
        ends = np.cumsum(self._pieces)
        document = int(np.searchsorted(ends, number, side="right"))
        start = (number - int(ends[document] - self._pieces[document])) * self.context
        ids = self.split.document(document)[start : start + self.context + 1].astype(np.int64)
        return Example(ids, np.ones(len(ids), bool))
