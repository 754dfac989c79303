"""What the same text costs without a neural network: an interpolated Kneser–Ney bigram model, and xz."""

from __future__ import annotations

import lzma

import numpy as np


class KneserNeyBigram:
    """Interpolated Kneser–Ney of order 2 over token ids (Kneser & Ney 1995; Chen & Goodman 1999, section 3.4).

    `p(w | v) = max(c(v w) - D, 0) / c(v) + D N(v •) / c(v) p(w)` with `p(w)` from the numbers of different contexts
    `N(• w)`, discounted likewise and interpolated with the uniform distribution, so that no token has probability 0.
    `D = n1 / (n1 + 2 n2)` at each level. Contexts never seen leave `p(w)`.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, vocab_size: int) -> None:
        """Count the pairs within documents: document `i` is `tokens[offsets[i]:offsets[i + 1]]`."""
        self._vocab_size = vocab_size
        previous, following = pairs(tokens, offsets)
        self._keys, self._counts = np.unique(previous * vocab_size + following, return_counts=True)
        contexts, targets = self._keys // vocab_size, self._keys % vocab_size
        self._context_counts = np.bincount(contexts, weights=self._counts, minlength=vocab_size)
        self._context_types = np.bincount(contexts, minlength=vocab_size)
        self._discount = discount(self._counts)
        self._unigram = self._lower_order(np.bincount(targets, minlength=vocab_size))

    def _lower_order(self, continuations: np.ndarray) -> np.ndarray:
        """p(w) from in how many contexts each token stands, shape `(vocab_size,)`; sums to 1."""
        total = continuations.sum()
        if total == 0:
            return np.full(self._vocab_size, 1 / self._vocab_size)
        cut = discount(continuations[continuations > 0])
        reserved = cut * np.count_nonzero(continuations) / total
        kept: np.ndarray = np.maximum(continuations - cut, 0) / total
        spread: np.ndarray = kept + reserved / self._vocab_size
        return spread

    def probabilities(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """p(following | previous), elementwise, float64."""
        previous, following = previous.astype(np.int64), following.astype(np.int64)
        keys = previous * self._vocab_size + following
        lower: np.ndarray = self._unigram[following]
        totals = self._context_counts[previous]
        seen = totals > 0
        totals = np.where(seen, totals, 1)
        if len(self._keys) == 0:
            return lower
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        counts = np.where(self._keys[at] == keys, self._counts[at], 0)
        direct = np.maximum(counts - self._discount, 0) / totals
        reserved = self._discount * self._context_types[previous] / totals
        mixed: np.ndarray = np.where(seen, direct + reserved * lower, lower)
        return mixed


def discount(counts: np.ndarray) -> float:
    """`n1 / (n1 + 2 n2)` of positive counts (Ney, Essen & Kneser 1994); 0.5 where no count is 1 or 2."""
    once, twice = int(np.sum(counts == 1)), int(np.sum(counts == 2))
    return once / (once + 2 * twice) if once else 0.5


def pairs(tokens: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring tokens of the same document, as (previous, following), int64."""
    within = np.ones(max(len(tokens) - 1, 0), dtype=bool)
    borders = np.asarray(offsets[1:-1], dtype=np.int64) - 1
    within[borders[(borders >= 0) & (borders < len(within))]] = False
    return tokens[:-1][within].astype(np.int64), tokens[1:][within].astype(np.int64)


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of `xz -9e` on `data`, container included."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
