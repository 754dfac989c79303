"""What one forward pass gets: `Batch`, and how sequences of unequal length are packed into its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.nn.attention import PADDING

Ints = NDArray[np.int64]
SHORT_ROW = 128
"""Packed rows are at least this long, if the context allows."""


@dataclass(frozen=True)
class Example:
    """One sequence: `ids (L,)`, and a bool `mask (L,)` of the tokens to be predicted (the first never is)."""

    ids: Ints
    mask: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """How many tokens are predicted."""
        return int(self.mask[1:].sum())

    def piece(self) -> Piece:
        """Every predicted token at the place of the one before it."""
        places = np.flatnonzero(self.mask[1:])
        return Piece(self.ids[:-1], places, self.ids[1:][places])


@dataclass(frozen=True)
class Piece:
    """What a model reads of one sequence, `ids (L,)`, and what it should say: `targets (N,)` at `places (N,)` of it."""

    ids: Ints
    places: Ints
    targets: Ints
    segments: Ints | None = None
    """`(L,)`, BERT's token types."""
    prefix: int = 0
    """The first tokens that see each other in both directions."""
    boundaries: Ints | None = None
    """`(N, 3)`, see `Batch.boundaries`, as places of this sequence."""
    source: Ints | None = None
    """`(S,)`, what the encoder of an encoder-decoder reads."""
    candidates: NDArray[np.bool_] | None = None
    """`(L,)`, tokens among which an answer is looked for."""
    label: int | None = None
    """What the sequence as a whole is."""


@dataclass(frozen=True)
class Batch:
    """`tokens (B, T)` int64, and only those positions from which something is predicted.

    `picks (N,)` are indices into the flattened `B * T` positions, `targets (N,)` the tokens that should follow. Logits
    are computed at `picks` alone.
    """

    tokens: Tensor
    picks: Tensor
    targets: Tensor
    positions: Tensor | None = None
    """`(B, T)`, restarting with every packed sequence; None where each row is one sequence."""
    documents: Tensor | None = None
    """`(B, T)`, which sequence of its row a token belongs to; None where each row is one sequence."""
    owners: Tensor | None = None
    """`(N,)`, which sequence of the batch each target belongs to, in the order they were given."""
    segments: Tensor | None = None
    """`(B, T)`, BERT's token types."""
    prefix: Tensor | None = None
    """`(B, T)` bool, tokens that all of their sequence may see (prefix language models)."""
    boundaries: Tensor | None = None
    """`(N, 3)` for each target in a masked span: the flat index of the token before its span, that of the one after it,
    and how far into the span it stands."""
    source: Tensor | None = None
    """`(B, S)`, what the encoder of an encoder-decoder reads."""
    source_documents: Tensor | None = None
    """`(B, S)`, as `documents`, with the ids of the sequences of which each is the source; None where none is padded
    and each row is one sequence."""
    candidates: Tensor | None = None
    """`(B, T)` bool, tokens among which answers are looked for."""
    firsts: Tensor | None = None
    """`(C,)`, flat index of the first token of every sequence of the batch, in the order they were given."""
    labels: Tensor | None = None
    """`(C,)`, what each sequence is."""
    balance: float = 1.0
    """Targets per label in the whole step: what a sum over labels is multiplied by to weigh as much as the targets."""
    size: int = 0
    """Real tokens, padding left out."""

    def pinned(self) -> Self:
        """The same batch in memory that a GPU can copy from by itself."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value.pin_memory()
        return replace(self, **found)

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`; copies to a GPU overlap with computation."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.pin_memory().to(device, non_blocking=True)
        return replace(self, **moved)


def pack(examples: Sequence[Example], length: int, packed: bool = True) -> Batch:
    """`lay_out` of examples, each of at most `length` + 1 ids."""
    return lay_out([example.piece() for example in examples], length, packed)


def lay_out(pieces: Sequence[Piece], length: int, packed: bool = True, causal: bool = True) -> Batch:
    """Lay `pieces` (each at most `length` ids, fields set in all or in none) into rows of at most `length` tokens.

    `packed`: several to a row, first fit by falling length, positions restarting, block-diagonal attention; else one to
    a row. Sources go where their targets go. Rows are as long as the fullest, rounded up to 8. The loss is the same
    either way. `causal` tells that no token sees a later one, so that padding on the right needs no mask.
    """
    sizes = np.array([[len(piece.ids), 0 if piece.source is None else len(piece.source)] for piece in pieces])
    # Rows no longer than need be: attention computes T x T, and short rows fill better (12 % faster at T = 256).
    length = min(length, max(SHORT_ROW, int(sizes.max())))
    rows, starts, filled = _first_fit(sizes, length) if packed else _one_each(sizes)
    places = _Places(rows, starts[:, 0], filled[:, 0], length)
    documents = places.fill([np.full(size, index) for index, size in enumerate(sizes[:, 0])], PADDING)
    alone = len(filled) == len(pieces) and (causal or not (documents == PADDING).any())
    positions = None if alone else torch.from_numpy(places.fill([np.arange(size) for size in sizes[:, 0]]))
    found: dict[str, Any] = {"positions": positions, "documents": None if alone else torch.from_numpy(documents)}
    if pieces[0].source is not None:
        found |= _sources(pieces, _Places(rows, starts[:, 1], filled[:, 1], length))
    return Batch(
        tokens=torch.from_numpy(places.fill([piece.ids for piece in pieces])),
        picks=_join([piece.places + first for piece, first in zip(pieces, places.firsts, strict=True)]),
        targets=_join([piece.targets for piece in pieces]),
        owners=_join([np.full(len(piece.targets), index) for index, piece in enumerate(pieces)]),
        **found,
        **_further(pieces, places),
        size=int(sizes.sum()),
    )


class _Places:
    """Where each sequence begins in rows of equal width, and arrays filled that way."""

    def __init__(self, rows: Ints, starts: Ints, filled: Ints, longest: int) -> None:
        self.count, self.width = len(filled), min(longest, -(-int(filled.max()) // 8) * 8)
        self.firsts = rows * self.width + starts
        """`(C,)`, flat."""

    def fill(self, values: Sequence[NDArray[Any]], padding: int = 0) -> Ints:
        """`(rows, width)` with each of `values` where its sequence is."""
        flat = np.full(self.count * self.width, padding, np.int64)
        for value, first in zip(values, self.firsts.tolist(), strict=True):
            flat[first : first + len(value)] = value
        return flat.reshape(self.count, self.width)


def _join(parts: Sequence[Ints]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _further(pieces: Sequence[Piece], places: _Places) -> dict[str, Any]:
    """The fields of the batch that only some objectives need: those that the pieces have."""
    found: dict[str, Any] = {}
    first = pieces[0]
    if first.segments is not None:
        segments = [piece.segments for piece in pieces if piece.segments is not None]
        found["segments"] = torch.from_numpy(places.fill(segments))
    if any(piece.prefix for piece in pieces):
        seen = [np.arange(len(piece.ids)) < piece.prefix for piece in pieces]
        found["prefix"] = torch.from_numpy(places.fill(seen)).bool()
    if first.candidates is not None:
        among = [piece.candidates for piece in pieces if piece.candidates is not None]
        found["candidates"] = torch.from_numpy(places.fill(among)).bool()
    if first.boundaries is not None:
        shifts = places.firsts[:, None] * [1, 1, 0]
        edges = [piece.boundaries for piece in pieces if piece.boundaries is not None]
        found["boundaries"] = _join([edge + shift for edge, shift in zip(edges, shifts, strict=True)])
    if first.label is not None:
        found["firsts"] = torch.from_numpy(places.firsts)
        found["labels"] = torch.tensor([piece.label for piece in pieces])
        found["balance"] = sum(len(piece.targets) for piece in pieces) / len(pieces)
    return found


def _sources(pieces: Sequence[Piece], places: _Places) -> dict[str, Any]:
    """What the encoder reads, and whose it is."""
    sources = [piece.source for piece in pieces if piece.source is not None]
    documents = places.fill([np.full(len(source), index) for index, source in enumerate(sources)], PADDING)
    alone = places.count == len(pieces)
    needed = not alone or bool((documents == PADDING).any())
    # Alone, the decoder's tokens name no document; then only PADDING counts.
    return {
        "source": torch.from_numpy(places.fill(sources)),
        "source_documents": torch.from_numpy(documents) if needed else None,
    }


def _one_each(sizes: Ints) -> tuple[Ints, Ints, Ints]:
    return np.arange(len(sizes)), np.zeros_like(sizes), sizes


def _first_fit(sizes: Ints, length: int) -> tuple[Ints, Ints, Ints]:
    """(row `(C,)` and start `(C, 2)` of each sequence and its source, how full each row is `(R, 2)`); longest first,
    which wastes least.
    """
    rows, starts = np.zeros(len(sizes), np.int64), np.zeros_like(sizes)
    filled: list[Ints] = []
    for index in sorted(range(len(sizes)), key=lambda index: -int(sizes[index].max())):
        size = sizes[index]
        row = next((row for row, used in enumerate(filled) if (used + size <= length).all()), len(filled))
        if row == len(filled):
            filled.append(np.zeros(2, np.int64))
        rows[index], starts[index] = row, filled[row]
        filled[row] = filled[row] + size
    return rows, starts, np.array(filled)
