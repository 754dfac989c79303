"""T5's span corruption (1910.10683, section 3.1.4): spans of a text are replaced by sentinels, and the target spells
out what each sentinel stands for. Pure functions; numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llmctl.errors import UsageError

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(noise tokens, noise spans) in a text of `length` >= 2 tokens; each span and each gap gets at least a token."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    return noise, spans


def corrupted_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(input, target) tokens that a text of `length` becomes, the closing EOS of both included."""
    noise, spans = noise_counts(length, density, mean_span)
    return length - noise + spans + 1, noise + spans + 1


@lru_cache
def raw_length(room: int, density: float, mean_span: float) -> int:
    """The longest text whose corrupted input fits into `room` tokens: 568 for 512, .15 and 3.

    UsageError if not even two tokens fit.
    """
    length = 2
    if corrupted_lengths(length, density, mean_span)[0] > room:
        raise UsageError(f"a context of {room} tokens is too short for span corruption", hint="use at least 8")
    while corrupted_lengths(length + 1, density, mean_span)[0] <= room:
        length += 1
    return length


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> Bools:
    """`(length,)`, true on noise: spans and gaps of random lengths take turns, a gap first."""
    noise, spans = noise_counts(length, density, mean_span)
    gaps, lengths = _segments(length - noise, spans, rng), _segments(noise, spans, rng)
    return np.repeat(np.tile([False, True], spans), np.stack([gaps, lengths], axis=1).reshape(-1))


def _segments(total: int, parts: int, rng: np.random.Generator) -> Ints:
    """`total` in `parts` parts of at least 1; every such division is equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt(ids: Ints, noise: Bools, sentinels: Sequence[int]) -> tuple[Ints, Ints]:
    """(input, target) without EOS: in the input each noise span is a sentinel, in the target each stretch between them.

    The first span takes the first of `sentinels`, and so on. UsageError if there are too few of them.
    """
    spans = int(np.count_nonzero(np.diff(noise, prepend=False) & noise))
    if spans > len(sentinels):
        raise UsageError(
            f"a text of {len(ids)} tokens has {spans} noise spans, the tokenizer {len(sentinels)} sentinels",
            hint="set `sentinels` of `tokenize` higher, mean_noise_span higher, or noise_density lower",
        )
    return _collapse(ids, noise, sentinels), _collapse(ids, ~noise, sentinels)


def _collapse(ids: Ints, drop: Bools, sentinels: Sequence[int]) -> Ints:
    """`ids` with each stretch of `drop` replaced by the next sentinel."""
    first = drop & ~np.concatenate([[False], drop[:-1]])
    found = ids.copy()
    found[first] = np.asarray(sentinels, np.int64)[: np.count_nonzero(first)]
    return found[~drop | first]  # type: ignore[no-any-return]  # numpy


def restore(source: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The text that `corrupt` took apart: each sentinel of `source` gives way to what follows it in `target`.

    A sentinel that `target` lacks, or that nothing follows, stands for nothing.
    """
    known = set(sentinels)
    filled: dict[int, list[int]] = {}
    current: list[int] = []
    for token in target:
        if token in known:
            current = filled.setdefault(token, [])
        else:
            current.append(token)
    return [token for place in source for token in (filled.get(place, []) if place in known else [place])]
