"""Pieces of documents, disturbed anew every epoch: the sources of every objective but next-token prediction.

Which token is masked, where a text is split, what follows a sentence: all of it is drawn by a generator seeded with
(seed, epoch, piece), so a batch stays a function of (seed, step).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.errors import InputError
from llmctl.text.shards import SplitTokens
from llmctl.text.tokenizer import Tokenizer
from llmctl.train import corruption, masking
from llmctl.train.batches import Batch, Ints, Piece, lay_out
from llmctl.train.data import JoinedSource
from llmctl.train.params import TrainParams

DISTURB = 2
"""Sets these random numbers apart from those that order the data."""
NEXT, RANDOM = 0, 1
"""Labels of next-sentence prediction, as BERT has them."""


@dataclass(frozen=True)
class Frame:
    """What stands around a text: [CLS] before it and [SEP] after it, or EOS alone."""

    opening: Sequence[int]
    closing: Sequence[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Frame:
        """The frame that the tokenizer puts around a document."""
        return cls(tokenizer.opening, tokenizer.closing)

    def __len__(self) -> int:
        return len(self.opening) + len(self.closing)

    def around(self, ids: Ints) -> Ints:
        """`ids` with the frame."""
        return np.concatenate([self.opening, ids, self.closing]).astype(np.int64)


BARE = Frame((), ())


class PieceSource(JoinedSource):
    """The documents of a split without their `frame`, each cut into equal pieces of at most `room` tokens.

    Documents of fewer than `shortest` tokens are left out. Rows hold up to `row` tokens, several pieces where they fit.
    With `fixed` a piece is disturbed the same way in all epochs.
    """

    causal = False

    def __init__(
        self,
        split: SplitTokens,
        frame: Frame,
        room: int,
        row: int,
        params: TrainParams,
        shortest: int = 1,
        fixed: bool = False,
    ) -> None:
        self.split, self.frame, self.fixed, self.length, self.row = split, frame, fixed, max(room, 1), row
        self.sizes = np.maximum(0, np.diff(split.offsets.astype(np.int64)) - len(frame))
        self._counts = np.where(self.sizes < shortest, 0, -(-self.sizes // self.length))
        self._ends = np.cumsum(self._counts)
        if not len(self._ends) or not self._ends[-1]:
            raise InputError(
                f"the split `{split.name}` has no document of {shortest} tokens beside special ones",
                hint="give more text",
            )
        super().__init__(int(self._ends[-1]), params)

    def volume(self) -> int:
        """Tokens of all documents that are not left out."""
        return int(self.sizes[self._counts > 0].sum())

    def item(self, epoch: int, place: int) -> Piece:
        """A piece, disturbed."""
        number = int(self.order(epoch)[place])
        return self.piece(number, self.random(epoch, number))

    def join(self, items: Sequence[Piece]) -> Batch:
        """Pieces, several to a row where they fit."""
        return lay_out(items, self.row, self.packed, self.causal)

    def random(self, epoch: int, number: int) -> np.random.Generator:
        """What disturbs piece `number` in `epoch`."""
        return np.random.default_rng([self.seed, DISTURB, 0 if self.fixed else epoch + 1, number])

    def where(self, number: int) -> tuple[int, int, int]:
        """(document, first token, one after the last) of a piece."""
        document = int(np.searchsorted(self._ends, number, side="right"))
        count, size = int(self._counts[document]), int(self.sizes[document])
        index = number - int(self._ends[document]) + count
        return document, size * index // count, size * (index + 1) // count

    def content(self, document: int, start: int, end: int) -> Ints:
        """Tokens `start` to `end` of a document, its frame not counted."""
        before = len(self.frame.opening)
        ids = self.split.document(document)[before : before + int(self.sizes[document])]
        return ids[start:end].astype(np.int64)

    @abstractmethod
    def piece(self, number: int, rng: np.random.Generator) -> Piece:
        """Piece `number`, disturbed by `rng`."""


@dataclass(frozen=True)
class Masking:
    """How a framed sequence is masked; `lengths` (see `masking.span_lengths`) means spans, of words or of tokens."""

    vocabulary: masking.Vocabulary
    share: float
    lengths: np.ndarray | None = None
    words: bool = True

    def apply(self, ids: Ints, rng: np.random.Generator) -> Piece:
        """`ids` with masks; the targets are what they hide."""
        candidates = ~self.vocabulary.special[ids]
        if self.lengths is None:
            chosen = masking.choose_tokens(candidates, self.share, rng)
            places = np.flatnonzero(chosen)
            return Piece(masking.hide_tokens(ids, chosen, self.vocabulary, rng), places, ids[places])
        units = self.vocabulary.words(ids) if self.words else np.arange(len(ids))
        spans = masking.choose_spans(candidates, units, self.share, self.lengths, rng)
        places, edges = masking.boundaries(spans)
        return Piece(masking.hide_spans(ids, spans, self.vocabulary, rng), places, ids[places], boundaries=edges)


class MaskedSource(PieceSource):
    """Pieces in their frame, masked: RoBERTa's and SpanBERT's data."""

    def __init__(
        self, split: SplitTokens, frame: Frame, context: int, params: TrainParams, masks: Masking, fixed: bool = False
    ) -> None:
        super().__init__(split, frame, context - len(frame), context, params, fixed=fixed)
        self.masks = masks

    def piece(self, number: int, rng: np.random.Generator) -> Piece:
        """A masked piece."""
        return self.masks.apply(self.frame.around(self.content(*self.where(number))), rng)


class NextSentenceSource(PieceSource):
    """Pairs [CLS] a [SEP] b [SEP], masked: b follows a in half of them, else it is as long, but of another document."""

    def __init__(
        self, split: SplitTokens, frame: Frame, context: int, params: TrainParams, masks: Masking, fixed: bool = False
    ) -> None:
        room = context - len(frame) - len(frame.closing)
        super().__init__(split, frame, room, context, params, shortest=2, fixed=fixed)
        self.masks = masks
        self._by_size = np.argsort(self.sizes, kind="stable")
        self._rank = np.argsort(self._by_size)
        if np.count_nonzero(self.sizes) < 2:
            raise InputError(
                f"the split `{split.name}` has one document, so there is no other to take a wrong next sentence from",
                hint="give more documents, or use objective: mlm",
            )

    def piece(self, number: int, rng: np.random.Generator) -> Piece:
        """A masked pair with its label."""
        document, start, end = self.where(number)
        cut = int(rng.integers(start + 1, end))
        first, second = self.content(document, start, cut), self.content(document, cut, end)
        label = int(rng.integers(2))
        if label == RANDOM:
            second = self.elsewhere(document, len(second), rng)
        masked = self.masks.apply(np.concatenate([self.frame.around(first), second, self.frame.closing]), rng)
        segments = (np.arange(len(masked.ids)) >= len(first) + len(self.frame)).astype(np.int64)
        return Piece(masked.ids, masked.places, masked.targets, segments, boundaries=masked.boundaries, label=label)

    def elsewhere(self, document: int, size: int, rng: np.random.Generator) -> Ints:
        """`size` tokens from a random place of a random other document; fewer where no other one is so long."""
        last = len(self.sizes) - 1
        first = int(np.searchsorted(self.sizes, size, sorter=self._by_size))
        own = int(self._rank[document])
        # Ranks from `first` on are long enough; one's own is passed over. Without any it is the longest other.
        drawn = int(rng.integers(min(first, last - 1), last))
        other = int(self._by_size[drawn + (drawn >= own)])
        start = int(rng.integers(max(0, int(self.sizes[other]) - size) + 1))
        return self.content(other, start, start + size)


class CorruptionSource(PieceSource):
    """T5's data: pieces with spans replaced by sentinels for the encoder, the spans for the decoder.

    `start` begins every target.
    """

    causal = True

    def __init__(
        self,
        split: SplitTokens,
        frame: Frame,
        context: int,
        params: TrainParams,
        sentinels: Sequence[int],
        start: int,
        density: float,
        mean_span: float,
    ) -> None:
        room = corruption.raw_length(context, density, mean_span)
        super().__init__(split, frame, room, context, params, shortest=2)
        self.sentinels, self.start, self.density, self.mean_span = sentinels, start, density, mean_span

    def piece(self, number: int, rng: np.random.Generator) -> Piece:
        """A corrupted piece and what was taken out of it."""
        ids = self.content(*self.where(number))
        noise = corruption.noise_mask(len(ids), self.density, self.mean_span, rng)
        source, target = corruption.corrupt(ids, noise, self.sentinels)
        return translation(source, target, self.frame, self.start)


def translation(source: Ints, target: Ints, frame: Frame, start: int) -> Piece:
    """A sequence for an encoder-decoder: `source` in its frame, `target` after `start` and closed."""
    answer = np.concatenate([target, frame.closing]).astype(np.int64)
    read = np.concatenate([[start], answer[:-1]])
    return Piece(read, np.arange(len(answer)), answer, source=frame.around(source))


class PrefixSource(PieceSource):
    """Texts split at a random point: the first part is read in both directions, the second is predicted.

    With `start` (an encoder-decoder) the encoder reads the first part and the decoder says the second.
    """

    causal = True

    def __init__(
        self, split: SplitTokens, frame: Frame, context: int, params: TrainParams, start: int | None = None
    ) -> None:
        self.start, self.around = start, frame
        # A decoder sees its documents as they are, BOS and EOS included.
        own, room = (BARE, context + 1) if start is None else (frame, context - len(frame))
        super().__init__(split, own, room, context, params, shortest=2)

    def piece(self, number: int, rng: np.random.Generator) -> Piece:
        """A text with its prefix."""
        ids = self.content(*self.where(number))
        cut = int(rng.integers(1, len(ids)))
        if self.start is not None:
            return translation(ids[:cut], ids[cut:], self.around, self.start)
        return Piece(ids[:-1], np.arange(cut - 1, len(ids) - 1), ids[cut:], prefix=cut)


def vocabulary_of(tokenizer: Tokenizer) -> masking.Vocabulary:
    """What masking needs of a tokenizer; InputError, saying what is missing, if it is not one of an encoder."""
    lacks = [
        name
        for name, found in (("[MASK]", tokenizer.mask_id), ("[CLS]", tokenizer.opening), ("[SEP]", tokenizer.closing))
        if found in (None, [])
    ]
    if tokenizer.mask_id is None or lacks:
        raise InputError(
            f"the tokenizer in {tokenizer.directory} has no {' and no '.join(lacks)} token, which masking needs",
            hint="make it with `tokenize` and special: bert or roberta",
        )
    special = np.zeros(tokenizer.vocab_size, bool)
    special[sorted(tokenizer.special_ids)] = True
    continues, leaves_open = tokenizer.word_joins()
    joins = np.array(continues), np.array(leaves_open)
    return masking.Vocabulary(tokenizer.mask_id, np.flatnonzero(~special), special, joins)
