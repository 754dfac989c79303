"""What is minimised. An objective turns a model and a batch into a summed loss; the loop knows no more of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.cross_entropy import hits, summed_loss, token_losses, wide


class Objective(Protocol):
    """Sums, never means: the loop divides by the weight of all micro-batches of a step together, so that any split of a
    batch gives the same gradient.
    """

    def weight(self, batch: Batch) -> int:
        """What this batch counts in the mean: its targets, or its pairs."""

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the batch, and further sums to be logged as means under their names."""


@runtime_checkable
class WritingObjective(Objective, Protocol):
    """An objective that learns from what the model itself writes."""

    def write(self, model: Transformer, step: int, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of `step`, some or all of them replaced by what `model` writes as it is now.

        Called once per step, before anything is counted. It must be a function of the weights, the step and the
        batches, so that a run that was interrupted writes the same.
        """


@dataclass(frozen=True)
class CausalLM:
    """Next-token cross-entropy over the batch's targets.

    With assistant-only targets it is supervised fine-tuning, with a prefix a prefix language model, with a source the
    objective of an encoder-decoder. `accuracy` counts hits as well.
    """

    accuracy: bool = False

    def weight(self, batch: Batch) -> int:
        """Target tokens."""
        return len(batch.targets)

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of -log p(target), in nats."""
        return summed_loss(model, target_states(model, batch), batch.targets, self.accuracy)


class MaskedLM:
    """Cross-entropy of what the masks hide.

    Where the batch has labels, the mean of next-sentence prediction is added (BERT); where the model has a boundary
    head, the same tokens are predicted from the boundaries of their spans as well (SpanBERT).
    """

    def weight(self, batch: Batch) -> int:
        """Masked tokens."""
        return len(batch.targets)

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over masked tokens, in nats, with `accuracy` and the parts of the sum where there are several."""
        flat = states(model, batch).flatten(0, 1)
        loss, further = summed_loss(model, flat.index_select(0, batch.picks), batch.targets, accuracy=True)
        parts: dict[str, Tensor] = {}
        if batch.labels is not None and batch.firsts is not None:
            answers = wide(model.next_sentence(flat.index_select(0, batch.firsts)[:, None]))
            parts["next_loss"] = batch.balance * F.cross_entropy(answers, batch.labels, reduction="sum")
            further["next_accuracy"] = batch.balance * hits(answers, batch.labels)
        if batch.boundaries is not None and "boundary" in model.auxiliary:
            left, right, offset = batch.boundaries.unbind(-1)
            edges = model.auxiliary["boundary"](flat.index_select(0, left), flat.index_select(0, right), offset)
            guesses = wide(F.linear(edges, model.head_weight))
            parts["boundary_loss"] = F.cross_entropy(guesses, batch.targets, reduction="sum")
            further["boundary_accuracy"] = hits(guesses, batch.targets)
        if parts:
            further["masked_loss"] = loss
        return sum(parts.values(), loss), {**further, **parts}


def states(model: Transformer, batch: Batch) -> Tensor:
    """The model's states `(B, T, D)` of a batch; an encoder-decoder reads the source first."""
    given = {name: getattr(batch, name) for name in ("segments", "prefix")}
    further = {name: value for name, value in given.items() if value is not None}
    if batch.source is not None:
        further["memory"] = model.remember(batch.source, batch.source_documents)
    return model.hidden(batch.tokens, positions=batch.positions, documents=batch.documents, **further)


def target_logits(model: Transformer, batch: Batch) -> Tensor:
    """Logits `(N, V)`, at least float32, at the batch's picks; no other position goes through the head."""
    return wide(model.head(target_states(model, batch)))


def target_states(model: Transformer, batch: Batch) -> Tensor:
    """States `(N, D)` at the batch's picks."""
    return states(model, batch).flatten(0, 1).index_select(0, batch.picks)


def target_logprobs(model: Transformer, batch: Batch) -> Tensor:
    """log p of each target, `(N,)` float32, in nats."""
    return -token_losses(model, target_states(model, batch), batch.targets)


def sequence_logprobs(model: Transformer, batch: Batch, count: int) -> Tensor:
    """log p of all targets of each of the batch's `count` sequences, `(count,)` float32; sums, not means."""
    assert batch.owners is not None
    logprobs = target_logprobs(model, batch)
    return torch.zeros(count, device=logprobs.device).index_add(0, batch.owners, logprobs)
