"""Loss on held-out data, per token and per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.device import Compute
from llmctl.train.objectives import Objective, target_logprobs

Validate = Callable[[Transformer, Compute], dict[str, float]]
"""Measures a model in evaluation mode; the names it returns are the ones reported."""


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
