"""What is minimised. An objective turns a model and a batch into a summed loss; the loop knows no more of it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.cross_entropy import summed_loss, token_losses


class Objective(Protocol):
    """Sums, never means: the loop divides by the weight of all micro-batches of a step together, so that any split of a
    batch gives the same gradient.
    """

    def weight(self, batch: Batch) -> int:
        """What this batch counts in the mean: its targets, or its pairs."""

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the batch, and further sums to be logged as means under their names."""


class CausalLM:
    """Next-token cross-entropy over the batch's targets; with assistant-only targets it is supervised fine-tuning."""

    def weight(self, batch: Batch) -> int:
        """Target tokens."""
        return len(batch.targets)

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of -log p(target), in nats."""
        return summed_loss(model, target_states(model, batch), batch.targets)


def target_logits(model: Transformer, batch: Batch) -> Tensor:
    """Logits `(N, V)` in float32 at the batch's picks; no other position goes through the head."""
    return model.head(target_states(model, batch)).float()


def target_states(model: Transformer, batch: Batch) -> Tensor:
    """States `(N, D)` at the batch's picks."""
    hidden = model.hidden(batch.tokens, positions=batch.positions, documents=batch.documents)
    return hidden.flatten(0, 1).index_select(0, batch.picks)


def target_logprobs(model: Transformer, batch: Batch) -> Tensor:
    """log p of each target, `(N,)` float32, in nats."""
    return -token_losses(model, target_states(model, batch), batch.targets)


def sequence_logprobs(model: Transformer, batch: Batch, count: int) -> Tensor:
    """log p of all targets of each of the batch's `count` sequences, `(count,)` float32; sums, not means."""
    assert batch.owners is not None
    logprobs = target_logprobs(model, batch)
    return torch.zeros(count, device=logprobs.device).index_add(0, batch.owners, logprobs)
