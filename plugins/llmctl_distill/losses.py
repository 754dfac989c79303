"""Distillation losses and the objective that computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.objectives import target_logits


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats summed over rows, of logits `(N, V)` softened by `temperature`, times its square.

    The square keeps the gradient's size: it is temperature times (student - teacher) probabilities (1503.02531, 2).
    """
    logs = F.log_softmax(student / temperature, dim=-1)
    goal = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(logs, goal, reduction="sum", log_target=True) * temperature**2


@dataclass(frozen=True)
class LogitDistillation:
    """(1 - alpha) times the softened forward KL plus alpha times the cross-entropy of the data."""

    teacher: Transformer
    """Frozen, in evaluation mode, on the student's device."""
    temperature: float = 1.0
    alpha: float = 0.0

    def weight(self, batch: Batch) -> int:
        """Target tokens."""
        return len(batch.targets)

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over targets. `kl`: at temperature 1, whatever the training's; `ce`: of the data's own tokens."""
        with torch.no_grad():
            goal = target_logits(self.teacher, batch)
        logits = target_logits(model, batch)
        soft = forward_kl(logits, goal, self.temperature)
        hard = F.cross_entropy(logits, batch.targets, reduction="sum")
        with torch.no_grad():
            kl = soft if self.temperature == 1 else forward_kl(logits, goal)
        loss = (1 - self.alpha) * soft + self.alpha * hard
        return loss, {"kl": kl.detach(), "ce": hard.detach()}
