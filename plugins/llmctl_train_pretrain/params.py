"""Parameters of `train-pretrain`: the model's shape, then how to train it."""

from __future__ import annotations

from typing import Any, Literal

from llmctl.spec.params import Field
from llmctl.train.params import Schedule, TrainParams

SHAPE = ("dim", "layers", "heads", "kv_heads", "ff_dim", "context", "rope_theta", "tie_embeddings")


class PretrainParams(TrainParams):
    """A shape left unset is the preset's, or that of the model given as input."""

    # Over 200 steps of the standard library 0.2 nats below cosine: short runs gain from a long high rate.
    schedule: Schedule = Field("wsd", description="Rate after warm-up; `wsd` holds it, then falls linearly.")
    preset: Literal["llama", "qwen3", "gpt2"] = Field("llama", description="Model family and its default shape.")
    dim: int | None = Field(None, ge=1, description="Width of the hidden states.")
    layers: int | None = Field(None, ge=1, description="Transformer blocks.")
    heads: int | None = Field(None, ge=1, description="Query heads.")
    kv_heads: int | None = Field(None, ge=1, description="Key/value heads; each serves heads / kv_heads query heads.")
    ff_dim: int | None = Field(
        None, ge=1, description="Feed-forward width. Unset: 8/3 dim rounded up to 32, or 4 dim (gpt2)."
    )
    context: int | None = Field(None, ge=8, description="Longest sequence in tokens; training rows have this length.")
    rope_theta: float | None = Field(None, gt=0, description="Base of the rotary frequencies.")
    tie_embeddings: bool | None = Field(None, description="Use the embedding as the output head.")

    def shape(self) -> dict[str, Any]:
        """The shape parameters that were set."""
        return {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}
