"""Parameters of `sft`."""

from __future__ import annotations

from typing import Literal

from llmctl.spec.params import Field
from llmctl.train.params import AnswerParams


class SftParams(AnswerParams):
    """Supervised fine-tuning; `batch_size` counts conversations."""

    method: Literal["full"] = Field("full", description="Which weights are trained: `full` trains all.")
    epochs: float = Field(3.0, gt=0, affects="extent", description="Passes over the conversations.")
    batch_size: int = Field(32, ge=1, description="Conversations per optimizer step.")
    probe_prompts: int = Field(
        32, ge=0, description="Validation prompts answered at the end to measure how often the answer stops. 0: none."
    )
    probe_tokens: int = Field(64, ge=1, description="Tokens within which such an answer must end.")
