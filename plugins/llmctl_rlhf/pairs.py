"""Batches of preference pairs with the reference model's log-probabilities, computed once before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from llmctl.nn.transformer import Transformer
from llmctl.stage import Context
from llmctl.train.batches import Batch, Example, Ints, pack
from llmctl.train.data import Pick, Source
from llmctl.train.device import Compute
from llmctl.train.objectives import sequence_logprobs
from llmctl.train.params import TrainParams


@dataclass(frozen=True)
class PairBatch(Batch):
    """Sequences in the order chosen, rejected, chosen, …; `reference (P, 2)` log-probabilities of the answers."""

    reference: Tensor = field(default_factory=lambda: torch.zeros(0, 2))


class PairSource(Source):
    """Preference pairs; a sequence is one pair, both answers in one forward pass."""

    def __init__(self, pairs: Sequence[tuple[Example, Example]], length: int, params: TrainParams) -> None:
        super().__init__(len(pairs), params)
        self.pairs, self.length = pairs, length
        self.reference = torch.zeros(len(pairs), 2)

    def batch(self, picks: Sequence[Pick]) -> PairBatch:
        """The pairs at `picks`, in that order."""
        numbers = [int(self.order(epoch)[place]) for epoch, place in picks]
        packed = pack([answer for number in numbers for answer in self.pairs[number]], self.length, self.packed)
        values = {item.name: getattr(packed, item.name) for item in fields(packed)}
        return PairBatch(**values, reference=self.reference[numbers])

    def lengths(self) -> Ints:
        """Tokens of both answers."""
        return np.array([len(chosen) + len(rejected) for chosen, rejected in self.pairs])

    def measure_reference(self, ctx: Context, model: Transformer, compute: Compute) -> None:
        """Fill `reference` with the frozen model's log-probabilities."""
        self.reference = self.logprobs(ctx, model, compute)

    @torch.no_grad()
    def logprobs(self, ctx: Context, model: Transformer, compute: Compute) -> Tensor:
        """log p of (chosen, rejected) of every pair under `model`, `(n, 2)` float32; sums over the answer."""
        model.to(compute.device).eval()
        found = []
        for number, batch in enumerate(self.sweep()):
            count = len(batch.reference)  # type: ignore[attr-defined]  # a PairBatch
            with compute.autocast():
                found.append(sequence_logprobs(model, batch.to(compute.device), 2 * count).view(-1, 2).cpu())
            ctx.progress(min((number + 1) * self.swept, self.size), self.size, measuring="log-probabilities")
        return torch.cat(found)
