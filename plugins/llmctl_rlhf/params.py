"""Parameters of `rlhf`."""

from __future__ import annotations

from typing import Literal

from llmctl.spec.params import Field
from llmctl.train.params import AnswerParams, Optimizer


class RlhfParams(AnswerParams):
    """Alignment with preferences; `batch_size` counts pairs."""

    algo: Literal["dpo"] = Field("dpo", description="`dpo`: Direct Preference Optimization (2305.18290).")
    beta: float = Field(0.1, gt=0, description="How strongly the policy is held to the model it started from.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed share of pairs whose label is wrong (conservative DPO)."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen answers' own loss per token beside the preference loss (RPO)."
    )
    batch_size: int = Field(16, ge=1, description="Pairs per optimizer step.")
    optimizer: Optimizer = Field("adamw", description="As for `sft`; AdamW holds more closely to the start.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate of the hidden matrices.")
    warmup_steps: int = Field(10, ge=0, description="Steps over which the rate rises linearly.")
