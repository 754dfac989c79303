"""Loss on held-out data, per token and per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmctl.nn.transformer import Transformer
from llmctl.text.shards import SplitTokens
from llmctl.train.batches import Batch
from llmctl.train.device import Compute
from llmctl.train.objectives import Objective, target_logprobs

Validate = Callable[[Transformer, Compute], dict[str, float]]
"""Measures a model in evaluation mode; the names it returns are the ones reported."""

CHUNK = 1 << 24
"""Tokens counted at once."""


@torch.no_grad()
def mean_loss(
    model: Transformer, objective: Objective, batches: Iterable[Batch], compute: Compute, name: str = "loss"
) -> dict[str, float]:
    """The objective's mean over all batches, weighted as in training: `<name>.validation` and its further metrics."""
    sums: dict[str, float] = {}
    weight = 0
    for batch in (batch.to(compute.device) for batch in batches):
        with compute.autocast():
            loss, further = objective.loss(model, batch)
        weight += objective.weight(batch)
        for key, value in {name: loss, **further}.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return {f"{key}.validation": value / max(1, weight) for key, value in sums.items()}


@dataclass(frozen=True)
class Unigram:
    """Guessing by frequency alone: the least that any objective has to beat."""

    logprobs: np.ndarray
    """`(V,)`, in nats, by the counts of the training text plus one."""

    @classmethod
    def of(cls, splits: Sequence[SplitTokens], vocab_size: int, special: Collection[int]) -> Unigram:
        """Counts all tokens of `splits` but the `special` ones."""
        counts = np.ones(vocab_size)
        for tokens in (split.tokens for split in splits):
            for start in range(0, len(tokens), CHUNK):
                counts += np.bincount(tokens[start : start + CHUNK], minlength=vocab_size)
        counts[list(special)] = 1
        return cls(np.log(counts / counts.sum()))

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """`unigram_loss.validation` and `unigram_accuracy.validation` on the batches' targets."""
        targets = np.concatenate([batch.targets.numpy() for batch in batches])
        hits = targets == self.logprobs.argmax()
        return {
            "unigram_loss.validation": float(-self.logprobs[targets].mean()),
            "unigram_accuracy.validation": float(hits.mean()),
        }


@torch.no_grad()
def language_loss(
    model: Transformer, batches: Iterable[Batch], compute: Compute, token_bytes: Sequence[int]
) -> dict[str, float]:
    """`loss.validation` in nats per target token and `bpb.validation` in bits per UTF-8 byte of text.

    `token_bytes (V,)`: bytes that each id stands for. Tokens that stand for no text (specials) count no bytes and no
    nats in bits per byte; in the loss per token they count as any other.
    """
    sizes = torch.tensor(token_bytes, device=compute.device)
    nats = text_nats = 0.0
    tokens = count = 0
    for batch in (batch.to(compute.device) for batch in batches):
        with compute.autocast():
            losses = -target_logprobs(model, batch).double()
        found = sizes[batch.targets]
        nats += float(losses.sum())
        text_nats += float(losses[found > 0].sum())
        tokens += len(losses)
        count += int(found.sum())
    return {"loss.validation": nats / max(1, tokens), "bpb.validation": text_nats / max(1, count) / math.log(2)}
