"""Parameters of `sft`."""

from __future__ import annotations

from typing import Literal

from llmctl.spec.params import Field
from llmctl.train.params import AnswerParams

OWN = {
    "probe_prompts": "chat",
    "probe_tokens": "chat",
    "pooling": "embedding",
    "temperature": "embedding",
}
"""The task that reads a parameter; all others are read by every task."""


class SftParams(AnswerParams):
    """Supervised fine-tuning; `batch_size` counts conversations, or labelled rows."""

    task: Literal[
        "auto", "chat", "classification", "token-classification", "question-answering", "seq2seq", "embedding"
    ] = Field(
        "auto", description="What is learnt. `auto`: chat from conversations, else the task of the labelled rows."
    )
    method: Literal["full"] = Field("full", description="Which weights are trained: `full` trains all.")
    epochs: float = Field(3.0, gt=0, affects="extent", description="Passes over the data.")
    batch_size: int = Field(32, ge=1, description="Conversations or rows per optimizer step.")
    probe_prompts: int = Field(
        32,
        ge=0,
        description="chat: validation prompts answered at the end to measure how often the answer stops. 0: none.",
    )
    probe_tokens: int = Field(64, ge=1, description="chat: tokens within which such an answer must end.")
    pooling: Literal["mean", "cls"] = Field(
        "mean", description="embedding: a text's vector is the mean of its states, or the state of its first token."
    )
    temperature: float = Field(
        0.05, gt=0, description="embedding: cosines are divided by it before the right pair is guessed among the batch."
    )
