"""GloVe: counts of words that stand near each other, and vectors whose products are their logarithms.

Pennington, Socher, Manning 2014; rates and first weights are those of stanfordnlp/GloVe's `glove.c`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmctl_embed.corpus import Corpus
from llmctl_embed.losses import glove_weights

BLOCK = 1 << 20
"""Words whose pairs are counted at once."""
MOST, FEWEST, REPEATS = 4096, 64, 32
"""Pairs of one step, and how often the word with most partners may be in it."""


@dataclass(frozen=True)
class Counts:
    """Pairs that occur: `words`, `contexts` (int64) and `values` (float64), each `(P,)`, in the order of the pairs."""

    words: np.ndarray
    contexts: np.ndarray
    values: np.ndarray


@dataclass
class Weights:
    """Two vectors and two biases of each word, `(2, V, D + 1)` float32: the bias is last."""

    values: Tensor
    squares: Tensor
    """Sums of squared gradients, from 1 (AdaGrad)."""

    @classmethod
    def fresh(cls, words: int, size: int, seed: int) -> Weights:
        """Even in ±0.5/D."""
        drawn = np.random.default_rng(seed).random((2, words, size + 1), dtype=np.float32)
        return cls(torch.from_numpy((drawn - 0.5) / size), torch.ones(2, words, size + 1))


def count(ids: np.ndarray, sentences: np.ndarray, words: int, window: int) -> Counts:
    """Sum of `1 / distance` over all pairs of a sentence up to `window` apart, both ways."""
    keys: np.ndarray = np.zeros(0, np.int64)
    values: np.ndarray = np.zeros(0)
    for begin in range(0, max(len(ids), 1), BLOCK):
        found, weights = [keys], [values]
        for distance in range(1, window + 1):
            stop = min(begin + BLOCK, len(ids) - distance)
            if stop <= begin:
                break
            here, there = slice(begin, stop), slice(begin + distance, stop + distance)
            same = sentences[here] == sentences[there]
            left, right = ids[here][same].astype(np.int64), ids[there][same].astype(np.int64)
            found += [left * words + right, right * words + left]
            weights += [np.full(len(left), 1 / distance)] * 2
        keys, places = np.unique(np.concatenate(found), return_inverse=True)
        values = np.bincount(places, np.concatenate(weights), minlength=len(keys))
    return Counts(keys // words, keys % words, values)


def shuffle(counts: Counts, words: int, seed: int) -> Counts:
    """The same counts, each on a random pair: every word is related to every other alike."""
    keys = distinct(np.random.default_rng([seed, 2]), words * words, len(counts.values))
    return Counts(keys // words, keys % words, counts.values)


def distinct(random: np.random.Generator, below: int, count: int) -> np.ndarray:
    """`count` different numbers of `0 … below - 1` in random order, `(count,)` int64.

    Memory grows with `count`: `Generator.choice` makes a table of all numbers if more than a fiftieth is drawn.
    """
    if 2 * count > below:
        return random.permutation(below)[:count]
    found = np.zeros(0, np.int64)
    while len(found) < count:
        found = np.union1d(found, random.integers(0, below, count - len(found)))
    return random.permutation(found)


def step(weights: Weights, pairs: Tensor, logs: Tensor, shares: Tensor, lr: float) -> float:
    """One step of AdaGrad in place for `pairs (2, B)`; the sum of their losses before it.

    Each pair's gradient is divided by the root of the squares before the step, as in `glove.c`.
    """
    left, right = (weights.values[side].index_select(0, pairs[side]) for side in (0, 1))
    error = (left[:, :-1] * right[:, :-1]).sum(1) + left[:, -1] + right[:, -1] - logs
    pull = (shares * error).unsqueeze(1)
    one = torch.ones_like(pull)
    for side, other in ((0, right), (1, left)):
        gradient = pull * torch.cat([other[:, :-1], one], 1)
        scale = weights.squares[side].index_select(0, pairs[side]).rsqrt_()
        weights.values[side].index_add_(0, pairs[side], gradient * scale, alpha=-lr)
        weights.squares[side].index_add_(0, pairs[side], gradient.square_())
    return float(0.5 * (shares * error**2).sum())


def pairs_per_step(counts: Counts, batch: int) -> int:
    """`batch`, or as many pairs as hold the word with most partners `REPEATS` times."""
    if batch:
        return batch
    often = float(np.bincount(counts.words).max() / max(len(counts.words), 1))
    return int(np.clip(REPEATS / often, FEWEST, MOST))


def train(
    corpus: Corpus,
    counts: Counts,
    *,
    size: int,
    epochs: int,
    lr: float,
    x_max: float,
    exponent: float,
    batch: int,
    seed: int,
    report: Callable[[int, int, float], None],
) -> tuple[Weights, float]:
    """(weights, mean loss of a pair in the last pass), the pairs in a new order each time."""
    weights = Weights.fresh(len(corpus.words), size, seed)
    random = np.random.default_rng([seed, 1])
    pairs = torch.from_numpy(np.stack([counts.words, counts.contexts]))
    values = torch.from_numpy(counts.values)
    logs, shares = values.log().float(), glove_weights(values, x_max, exponent).float()
    taken, mean = pairs_per_step(counts, batch), 0.0
    for epoch in range(epochs):
        loss = 0.0
        for chosen in torch.split(torch.from_numpy(random.permutation(len(values))), taken):
            loss += step(weights, pairs[:, chosen], logs[chosen], shares[chosen], lr)
        mean = loss / max(len(values), 1)
        report(epoch + 1, epochs, mean)
    return weights, mean
