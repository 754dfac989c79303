"""Parameters of `distill`."""

from __future__ import annotations

from typing import Literal

from llmctl.spec.params import Field
from llmctl.train.params import AnswerParams


class DistillParams(AnswerParams):
    """Knowledge distillation; `batch_size` counts conversations, or rows of tokens."""

    method: Literal["logits"] = Field(
        "logits", description="`logits`: forward KL to the teacher's distribution at every target (1503.02531)."
    )
    temperature: float = Field(
        1.0, gt=0, description="Both distributions are softened by it; the loss is multiplied by its square."
    )
    alpha: float = Field(
        0.0, ge=0, le=1, description="Share of the cross-entropy of the data's own tokens; 0: the teacher alone."
    )
    epochs: float = Field(3.0, gt=0, affects="extent", description="Passes over the data.")
    batch_size: int = Field(32, ge=1, description="Conversations, or rows of tokens, per optimizer step.")
