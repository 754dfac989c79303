"""Parameters of `train-pretrain`: the model's shape, then how to train it."""

from __future__ import annotations

from typing import Any, Literal

from llmctl.spec.params import Field
from llmctl.train.params import TrainParams

SHAPE = (
    "dim",
    "layers",
    "heads",
    "kv_heads",
    "ff_dim",
    "context",
    "window",
    "pattern",
    "rope_theta",
    "tie_embeddings",
)

Goal = Literal["causal", "mlm", "mlm-nsp", "span", "corruption", "prefix"]
OWN: dict[str, tuple[Goal, ...]] = {
    "mask_share": ("mlm", "mlm-nsp", "span"),
    "masking": ("mlm", "mlm-nsp", "span"),
    "span_p": ("span",),
    "span_max": ("span",),
    "span_unit": ("span",),
    "boundary": ("span",),
    "noise_density": ("corruption",),
    "mean_noise_span": ("corruption",),
}
"""The objectives that read a parameter."""


class PretrainParams(TrainParams):
    """A shape left unset is the preset's, or that of the model given as input."""

    # Over 200 steps of the standard library 0.2 nats below cosine: short runs gain from a long high rate.
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "wsd", description="Rate after warm-up; `wsd` holds it, then falls linearly."
    )
    preset: Literal["llama", "qwen3", "gpt2", "gpt3", "bert", "roberta", "spanbert", "t5"] = Field(
        "llama", description="Model family and its default shape."
    )
    objective: Literal["auto", "causal", "mlm", "mlm-nsp", "span", "corruption", "prefix"] = Field(
        "auto",
        description="`causal`: the next token; `prefix`: the same behind a part read in both directions; `mlm`: masked "
        "tokens; `mlm-nsp`: and whether a second text follows the first (BERT); `span`: masked spans, also from their "
        "boundaries (SpanBERT); `corruption`: spans behind sentinels (T5). `auto`: what fits the preset.",
    )
    mask_share: float = Field(0.15, gt=0, lt=1, description="mlm, mlm-nsp, span: share of the tokens that are masked.")
    masking: Literal["dynamic", "static"] = Field(
        "dynamic", description="mlm, mlm-nsp, span: new masks every epoch, or the same ones."
    )
    span_p: float = Field(0.2, gt=0, lt=1, description="span: p of the geometric distribution of lengths.")
    span_max: int = Field(10, ge=1, description="span: longest span.")
    span_unit: Literal["words", "tokens"] = Field("words", description="span: what lengths count; words stay whole.")
    boundary: bool = Field(True, description="span: predict each token from the boundaries of its span as well.")
    noise_density: float = Field(0.15, gt=0, le=0.5, description="corruption: share of the tokens in noise spans.")
    mean_noise_span: float = Field(3.0, ge=1, description="corruption: mean tokens of a noise span.")
    dim: int | None = Field(None, ge=1, description="Width of the hidden states.")
    layers: int | None = Field(None, ge=1, description="Transformer blocks.")
    heads: int | None = Field(None, ge=1, description="Query heads.")
    kv_heads: int | None = Field(None, ge=1, description="Key/value heads; each serves heads / kv_heads query heads.")
    ff_dim: int | None = Field(
        None, ge=1, description="Feed-forward width. Unset: 8/3 dim rounded up to 32, or 4 dim (gpt2)."
    )
    context: int | None = Field(None, ge=8, description="Longest sequence in tokens; training rows have this length.")
    window: int | None = Field(None, ge=1, description="Tokens that a layer of the kind S sees, its own included.")
    pattern: str | None = Field(
        None,
        pattern="^[LSN]+$",
        description="Kinds of layer, repeated over the depth: L sees all, S a window, N all and without positions.",
    )
    rope_theta: float | None = Field(None, gt=0, description="Base of the rotary frequencies.")
    tie_embeddings: bool | None = Field(None, description="Use the embedding as the output head.")

    def shape(self) -> dict[str, Any]:
        """The shape parameters that were set."""
        return {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}
