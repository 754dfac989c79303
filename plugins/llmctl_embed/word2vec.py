"""Skip-gram and CBOW with negative sampling (1301.3781, 1310.4546), in steps over many words at once.

A step takes some words with their contexts. Each word draws its wrong words once, for all of its contexts, as in Ji et
al. (1604.04661): their gradients are then small matrix products, and each vector is read and written once per word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmctl_embed.corpus import Corpus
from llmctl_embed.params import EmbedParams

MEASURED = 4096
"""Words of a block whose loss is measured after it."""
BLOCK = 1 << 16
"""Words whose contexts are laid out at once."""
MOST, FEWEST = 1024, 16
"""Words of one step."""
REPEATS = 32
"""How often the most frequent word may be in a step, on average: all of its gradients are of the same weights."""


@dataclass
class Weights:
    """Both vectors of each word, `(V, D)` float32."""

    inputs: Tensor
    outputs: Tensor

    @classmethod
    def fresh(cls, words: int, size: int, seed: int) -> Weights:
        """Inputs even in ±0.5/D, outputs 0, as in word2vec."""
        drawn = np.random.default_rng(seed).random((words, size), dtype=np.float32)
        return cls(torch.from_numpy((drawn - 0.5) / size), torch.zeros(words, size))


@dataclass(frozen=True)
class Block:
    """`words (N,)`, their `contexts (N, 2w)` and which of these are real, `(N, 2w)`."""

    words: Tensor
    contexts: Tensor
    real: Tensor


def keep_shares(counts: np.ndarray, sample: float) -> np.ndarray:
    """Probability `(V,)` that an occurrence is kept: `√(s/f) + s/f`, at most 1, as in word2vec's program."""
    if sample == 0:
        return np.ones(len(counts))
    ratio = sample * counts.sum() / counts
    return np.asarray(np.minimum(np.sqrt(ratio) + ratio, 1.0))


def noise(counts: np.ndarray, exponent: float) -> np.ndarray:
    """The distribution `(V,)` of wrong words."""
    weights = counts.astype(np.float64) ** exponent
    return np.asarray(weights / weights.sum())


def lay_out(ids: np.ndarray, sentences: np.ndarray, reach: np.ndarray, window: int) -> Block:
    """Contexts of each word, up to `reach (N,)` words away in its sentence. Words without any are left out."""
    size = len(ids)
    contexts, real = np.zeros((size, 2 * window), np.int64), np.zeros((size, 2 * window), bool)
    for distance in range(1, min(window, size - 1) + 1):
        same = sentences[distance:] == sentences[:-distance]
        for column, here, there in (
            (2 * distance - 2, slice(None, -distance), slice(distance, None)),
            (2 * distance - 1, slice(distance, None), slice(None, -distance)),
        ):
            contexts[here, column] = ids[there]
            real[here, column] = same & (reach[here] >= distance)
    some = real.any(axis=1)
    return Block(*(torch.from_numpy(array[some]) for array in (ids.astype(np.int64), contexts, real)))


def blocks(corpus: Corpus, params: EmbedParams, random: np.random.Generator) -> Iterator[tuple[int, Block]]:
    """(words read, block) over one pass: frequent words thinned out, windows drawn, words in a new order."""
    keep = keep_shares(corpus.counts, params.sample)
    starts = np.flatnonzero(np.diff(corpus.sentences, prepend=-1))
    begin = 0
    while begin < len(corpus.ids):
        after = np.searchsorted(starts, begin + BLOCK, "right")  # a block ends where a sentence does, if one does
        end = len(corpus.ids) if begin + BLOCK >= len(corpus.ids) else int(starts[after - 1])
        end = end if end > begin else min(begin + BLOCK, len(corpus.ids))
        ids = corpus.ids[begin:end]
        kept = random.random(len(ids)) < keep[ids]
        ids, numbers = ids[kept], corpus.sentences[begin:end][kept]
        reach = random.integers(1, params.window + 1, len(ids)) if params.shrink_windows else np.full(len(ids), 1 << 30)
        block = lay_out(ids, numbers, reach, params.window)
        order = torch.from_numpy(random.permutation(len(block.words)))
        yield end, Block(block.words[order], block.contexts[order], block.real[order])
        begin = end


@dataclass(frozen=True)
class Examples:
    """What one step learns from, or what a block's steps are cut from."""

    targets: Tensor
    """`(N, 1 + K)`: the word, then the wrong ones."""
    counted: Tensor
    """`(N, 1 + K, 1)` float32: 0 for a wrong word that is the right one, which is left out."""
    contexts: Tensor
    """`(N, 2w)`."""
    shares: Tensor
    """`(N, 1, 2w)` float32: of each context; 1, or with CBOW's mean one by their number, and 0 where there is none."""

    @classmethod
    def of(cls, block: Block, wrong: Tensor, *, mean: bool) -> Examples:
        """`wrong (N, K)`."""
        word = block.words.unsqueeze(1)
        counted = torch.cat([torch.ones_like(word), wrong != word], 1).float().unsqueeze(2)
        shares = block.real.float().unsqueeze(1)
        shares = shares / shares.sum(2, keepdim=True) if mean else shares
        return cls(torch.cat([word, wrong], 1), counted, block.contexts, shares)

    def part(self, begin: int, size: int) -> Examples:
        """`size` words from `begin` on."""
        return Examples(*(t[begin : begin + size] for t in (self.targets, self.counted, self.contexts, self.shares)))


@torch.inference_mode()
def step(weights: Weights, taken: Examples, lr: float, *, cbow: bool) -> None:
    """One step of gradient descent on the loss of the examples, in place."""
    size = weights.inputs.shape[1]
    output = weights.outputs.index_select(0, taken.targets.view(-1)).view(*taken.targets.shape, size)
    vectors = weights.inputs.index_select(0, taken.contexts.view(-1)).view(*taken.contexts.shape, size)
    if cbow:
        vectors = torch.bmm(taken.shares, vectors)
    push = torch.bmm(output, vectors.transpose(1, 2)).sigmoid_().neg_()  # (N, 1 + K, 2w), or (N, 1 + K, 1)
    push[:, 0] += 1
    push.mul_(taken.counted).mul_(lr)
    if not cbow:
        push.mul_(taken.shares)
    to_inputs = torch.bmm(push.transpose(1, 2), output)
    if cbow:
        to_inputs = torch.bmm(taken.shares.transpose(1, 2), to_inputs)
    weights.outputs.index_add_(0, taken.targets.view(-1), torch.bmm(push, vectors).view(-1, size))
    weights.inputs.index_add_(0, taken.contexts.view(-1), to_inputs.view(-1, size))


@torch.inference_mode()
def loss_of(weights: Weights, taken: Examples, *, cbow: bool) -> float:
    """Mean loss of the examples: pairs, or with CBOW words."""
    output, vectors = weights.outputs[taken.targets], weights.inputs[taken.contexts]
    if cbow:
        vectors = torch.bmm(taken.shares, vectors)
    scores = torch.bmm(output, vectors.transpose(1, 2))
    scores[:, 1:].neg_()
    counted = taken.counted if cbow else taken.counted * taken.shares
    examples = len(taken.targets) if cbow else float(taken.shares.sum())
    return float(-(logsigmoid(scores) * counted).sum()) / max(examples, 1)


def words_per_step(corpus: Corpus, params: EmbedParams) -> int:
    """`batch`, or as many words as hold the most frequent one `REPEATS` times, after thinning out."""
    if params.batch:
        return params.batch
    left = corpus.counts * keep_shares(corpus.counts, params.sample)
    often = max(float(left.max() / left.sum()), params.negative * float(noise(corpus.counts, params.ns_exponent).max()))
    return int(np.clip(REPEATS / often, FEWEST, MOST))


def train(
    corpus: Corpus, params: EmbedParams, epochs: int, lr: float, report: Callable[[int, int, float], None]
) -> tuple[Weights, float]:
    """(weights, mean loss of the last block's first examples). `report(words, of, loss)` after each block may raise.

    The rate falls in a line with the words read. Equal seeds give equal weights on one thread.
    """
    weights = Weights.fresh(len(corpus.words), params.vector_size, params.seed)
    random = np.random.default_rng([params.seed, 1])
    ladder = np.cumsum(noise(corpus.counts, params.ns_exponent))
    size, cbow = words_per_step(corpus, params), params.architecture == "cbow"
    total, loss = epochs * len(corpus.ids), 0.0
    for epoch in range(epochs):
        before = 0
        for read, block in blocks(corpus, params, random):
            drawn = np.searchsorted(ladder, random.random((len(block.words), params.negative)) * ladder[-1], "right")
            wrong = torch.from_numpy(np.minimum(drawn, len(ladder) - 1))
            examples = Examples.of(block, wrong, mean=cbow and params.cbow_mean)
            for begin in range(0, len(block.words), size):
                share = begin / len(block.words)
                done = (epoch * len(corpus.ids) + before + share * (read - before)) / total
                step(weights, examples.part(begin, size), lr - (lr - params.min_lr) * done, cbow=cbow)
            loss, before = loss_of(weights, examples.part(0, MEASURED), cbow=cbow), read
            report(epoch * len(corpus.ids) + read, total, loss)
    return weights, loss
