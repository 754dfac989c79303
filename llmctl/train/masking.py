"""Which tokens an encoder has to guess, and what it sees in their place: single tokens (BERT, 1810.04805) or whole
spans (SpanBERT, 1907.10529). Pure functions of their arguments and a random generator; numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Span = tuple[int, int]
"""(first, one after the last) token of a masked span."""

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become [MASK], or a random token; the rest stays as it is."""


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of a tokenizer's ids."""

    mask_id: int
    ordinary: Ints
    """Ids that stand for text: only they are masked, and only they are drawn as random tokens."""
    special: Bools
    """`(V,)`, true for the ids that are never masked."""
    joins: tuple[Bools, Bools]
    """`(V,)` twice: whether a token can continue a word, and whether a word can go on after it."""

    def words(self, ids: Ints) -> Ints:
        """`(L,)`, the number of the word that each token is part of; special tokens are words of their own."""
        continues, open_ended = self.joins
        joined = continues[ids[1:]] & open_ended[ids[:-1]]
        return np.concatenate([[0], np.cumsum(~joined)])


def choose_tokens(candidates: Bools, share: float, rng: np.random.Generator) -> Bools:
    """`share` of the `candidates (L,)`, rounded, at least one where there is any; every subset is equally likely."""
    places = np.flatnonzero(candidates)
    chosen = np.zeros(len(candidates), bool)
    if len(places):
        chosen[rng.choice(places, max(1, round(share * len(places))), replace=False)] = True
    return chosen


def span_lengths(p: float, longest: int) -> NDArray[np.float64]:
    """Probabilities of the lengths 1 to `longest`: geometric, cut off and scaled up to 1 (mean 3.797 for .2 and 10)."""
    weights = p * (1 - p) ** np.arange(longest)
    return weights / weights.sum()  # type: ignore[no-any-return]  # numpy


def choose_spans(
    candidates: Bools, units: Ints, share: float, lengths: NDArray[np.float64], rng: np.random.Generator
) -> list[Span]:
    """Spans over about `share` of the units of the `candidates (L,)`, in order, none touching another.

    `units (L,)` rise along the sequence: a unit (a word, or a token) is taken whole, and lengths count units. All
    lengths are drawn before any span is placed, so that no place is easier to find for short ones.
    """
    starts, ends, runs = _candidate_units(candidates, units)
    if not len(starts):
        return []
    free = np.ones(len(starts), bool)
    found = []
    # The longest first: later ones must fit into what is left.
    for length in sorted(_draw_lengths(share * len(starts), lengths, rng), reverse=True):
        length = min(length, int(np.bincount(runs).max()))
        window = np.lib.stride_tricks.sliding_window_view
        fits = window(free, length).all(axis=1) & (runs[: len(runs) - length + 1] == runs[length - 1 :])
        places = np.flatnonzero(fits)
        if not len(places):
            continue
        first = int(rng.choice(places))
        free[max(0, first - 1) : first + length + 1] = False  # one unit stays visible on either side
        found.append((int(starts[first]), int(ends[first + length - 1])))
    return sorted(found)


def _candidate_units(candidates: Bools, units: Ints) -> tuple[Ints, Ints, Ints]:
    """(start, end, run) of every unit all of whose tokens are candidates; units of one run stand side by side."""
    borders = np.flatnonzero(np.diff(units)) + 1
    starts, ends = np.concatenate([[0], borders]), np.concatenate([borders, [len(units)]])
    whole = np.logical_and.reduceat(candidates, starts)
    runs = np.cumsum(~whole)[whole]
    return starts[whole], ends[whole], np.unique(runs, return_inverse=True)[1] if len(runs) else runs


def _draw_lengths(budget: float, lengths: NDArray[np.float64], rng: np.random.Generator) -> list[int]:
    """Lengths that add up to `budget` on average, at least one.

    Drawing ends with the length that passes a bound, which is taken whole: a rule that looks at no later draw leaves
    the mean length what it is (Wald), and the bound lies below the budget by the mean excess.
    """
    sizes = np.arange(1, len(lengths) + 1)
    excess = ((sizes**2 @ lengths) / (sizes @ lengths) - 1) / 2
    drawn = [int(rng.choice(sizes, p=lengths))]
    while sum(drawn) < budget - excess:
        drawn.append(int(rng.choice(sizes, p=lengths)))
    return drawn


def hide_tokens(ids: Ints, chosen: Bools, vocabulary: Vocabulary, rng: np.random.Generator) -> Ints:
    """A copy of `ids` in which each chosen token is by its own lot masked (.8), replaced at random (.1), or kept."""
    hidden = ids.copy()
    places = np.flatnonzero(chosen)
    lots = rng.random(len(places))
    hidden[places[lots < MASKED]] = vocabulary.mask_id
    swapped = places[(lots >= MASKED) & (lots < MASKED + RANDOM)]
    hidden[swapped] = rng.choice(vocabulary.ordinary, len(swapped))
    return hidden


def hide_spans(ids: Ints, spans: Sequence[Span], vocabulary: Vocabulary, rng: np.random.Generator) -> Ints:
    """As `hide_tokens`, but with one lot for each span."""
    hidden = ids.copy()
    for (start, end), lot in zip(spans, rng.random(len(spans)), strict=True):
        if lot < MASKED:
            hidden[start:end] = vocabulary.mask_id
        elif lot < MASKED + RANDOM:
            hidden[start:end] = rng.choice(vocabulary.ordinary, end - start)
    return hidden


def boundaries(spans: Sequence[Span]) -> tuple[Ints, Ints]:
    """(places `(N,)`, boundaries `(N, 3)`) of all tokens of `spans`: the token before the span, the one after it, and
    how far into the span the token stands, from 0.
    """
    places = [place for start, end in spans for place in range(start, end)]
    edges = [(start - 1, end, place - start) for start, end in spans for place in range(start, end)]
    return np.array(places, np.int64), np.array(edges, np.int64).reshape(-1, 3)
