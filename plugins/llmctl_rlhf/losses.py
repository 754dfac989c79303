"""Preference losses as functions of log-probabilities, and the objective that computes those."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.objectives import sequence_logprobs
from llmctl_rlhf.pairs import PairBatch


def implicit_margin(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """beta times how much more than the reference the policy prefers the chosen answer, `(P,)`.

    `policy` and `reference` `(P, 2)`: log-probabilities of the chosen and the rejected answer, summed over the answer's
    tokens, EOS included.
    """
    gaps = (policy - reference).to(policy.dtype)
    return beta * (gaps[:, 0] - gaps[:, 1])


def dpo_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(margin) per pair, `(P,)` (2305.18290, eq. 7); with smoothing e, the mean over a label that is wrong
    with probability e (Mitchell 2023, "A note on DPO with noisy preferences")."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


@dataclass(frozen=True)
class DPO:
    """The policy against a frozen reference whose log-probabilities stand in the batch."""

    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def weight(self, batch: Batch) -> int:
        """Pairs."""
        return len(_pairs(batch).reference)

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over pairs. `accuracy`: the implicit reward prefers the chosen answer; `ranking`: the policy itself does;
        `chosen` and `rejected`: log-probabilities of whole answers, since the chosen one may fall, too."""
        reference = _pairs(batch).reference
        policy = sequence_logprobs(model, batch, 2 * len(reference)).view(-1, 2)
        margin = implicit_margin(policy, reference, self.beta)
        loss = dpo_loss(margin, self.label_smoothing).sum()
        sums = {
            "accuracy": (margin > 0).sum(),
            "margin": margin.sum(),
            "ranking": (policy[:, 0] > policy[:, 1]).sum(),
            "chosen": policy[:, 0].sum(),
            "rejected": policy[:, 1].sum(),
        }
        if self.sft_weight:
            nll = -(policy[:, 0] / chosen_lengths(batch)).sum()
            loss = loss + self.sft_weight * nll
            sums["nll"] = nll
        return loss, {name: value.detach() for name, value in sums.items()}


def chosen_lengths(batch: Batch) -> Tensor:
    """Supervised tokens of each chosen answer, `(P,)`."""
    assert batch.owners is not None
    return torch.bincount(batch.owners, minlength=2 * len(_pairs(batch).reference)).view(-1, 2)[:, 0]


def _pairs(batch: Batch) -> PairBatch:
    assert isinstance(batch, PairBatch)
    return batch
