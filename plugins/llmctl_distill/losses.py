"""Divergences between next-token distributions, and the objectives that compute them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.cross_entropy import wide
from llmctl.train.objectives import target_states


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """In nats summed over rows, of logits `(N, V)` softened by `temperature`, times its square.

    beta KL(teacher, mixture) + (1 - beta) KL(student, mixture) with the mixture beta teacher + (1 - beta) student
    (2306.13649, eq. 1). Divided by beta (1 - beta) it has the two KLs as its limits, which stand at the ends: 0 is
    KL(teacher, student), 1 KL(student, teacher). The square keeps the gradient's size: of KL(teacher, student) it is
    temperature times (student - teacher) probabilities (1503.02531, 2).
    """
    own = F.log_softmax(student / temperature, dim=-1)
    goal = F.log_softmax(teacher / temperature, dim=-1)
    if beta == 0:
        return _kl(goal, own) * temperature**2
    if beta == 1:
        return _kl(own, goal) * temperature**2
    mixture = torch.logaddexp(goal + math.log(beta), own + math.log1p(-beta))
    return (beta * _kl(goal, mixture) + (1 - beta) * _kl(own, mixture)) * temperature**2


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher, student), as `generalized_jsd`."""
    return generalized_jsd(student, teacher, 0.0, temperature)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of log-probabilities, summed; torch takes the second distribution first."""
    return F.kl_div(q, p, reduction="sum", log_target=True)


@dataclass(frozen=True)
class LogitDistillation:
    """(1 - alpha) times the divergence from the teacher plus alpha times the cross-entropy of the data."""

    teacher: Transformer
    """Frozen, in evaluation mode, on the student's device."""
    temperature: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0
    """Which divergence: see `generalized_jsd`."""

    def weight(self, batch: Batch) -> int:
        """Target tokens."""
        return len(batch.targets)

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over targets. `kl`: KL(teacher, student) at temperature 1, whatever is minimised; `ce`: of the data's own
        tokens."""
        with torch.no_grad():
            goals = target_states(self.teacher, batch)
        return self.compare(model, target_states(model, batch), goals, batch.targets)

    def compare(
        self, model: Transformer, states: Tensor, goals: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of states `(N, D)` of the two models, from which their heads make logits.

        With `model.loss_chunk` so many logits are held at a time, and made again for the gradient.
        """
        chunk = model.loss_chunk or max(1, len(targets))
        found = []
        for parts in zip(*(torch.split(given, chunk) for given in (states, goals, targets)), strict=True):
            if chunk < len(targets):
                found.append(checkpoint(self._sums, model, *parts, use_reentrant=False))
            else:
                found.append(self._sums(model, *parts))
        soft, hard, kl = (sum(some[1:], start=some[0]) for some in zip(*found, strict=True))
        loss = (1 - self.alpha) * soft + self.alpha * hard
        return loss, {"kl": kl.detach(), "ce": hard.detach()}

    def _sums(self, model: Transformer, states: Tensor, goals: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """(divergence, cross-entropy, KL at temperature 1) of some targets."""
        logits = wide(model.head(states))
        with torch.no_grad():
            goal = wide(self.teacher.head(goals))
        soft = generalized_jsd(logits, goal, self.beta, self.temperature)
        hard = F.cross_entropy(logits, targets, reduction="sum")
        with torch.no_grad():
            kl = soft if self.temperature == 1 and self.beta == 0 else forward_kl(logits, goal)
        return soft, hard, kl
