"""Parameters of `train-pretrain`: the model's shape, then how to train it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveFloat, field_validator, model_validator

from llmctl.nn.config import RopeScaling
from llmctl.nn.presets import near_presets, preset_names
from llmctl.nn.published import PUBLISHED
from llmctl.spec.params import Field, Params
from llmctl.train.params import Schedule, TrainParams

SHAPE = (
    "dim", "layers", "encoder_layers", "heads", "kv_heads", "ff_dim", "context", "window", "pattern", "positions",
    "rope_theta", "norm_eps", "tie_embeddings", "qk_norm", "qk_gain", "activation", "gated", "value_pattern",
    "stream_weights", "backout", "smear", "logit_softcap",
)  # fmt: skip

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
    "document_mask": ("causal",),
}
"""The objectives that read a parameter."""


class RopeScalingParams(Params):
    """How rotary frequencies are changed for sequences longer than those that were trained."""

    kind: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3"] = Field(
        "none",
        description="`linear`: positions divided by factor; `ntk`: a larger base; `dynamic`: ntk that grows with the "
        "sequence; `yarn`, `llama3`: by the wavelength of each channel.",
    )
    factor: float = Field(2.0, ge=1, description="How many times the original context.")
    original_context: int | None = Field(
        None, ge=1, description="Context that was trained. Unset: that of the model to continue, or of the preset."
    )
    attention_factor: float = Field(
        0.0, ge=0, description="yarn: what cos and sin are multiplied with. 0: 0.1 ln(factor) + 1."
    )
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: longer waves than original / this are stretched.")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: shorter waves than original / this stay.")

    @model_validator(mode="after")
    def _read_by_its_kind(self) -> RopeScalingParams:
        read = {"kind"} | (set() if self.kind == "none" else {"factor", "original_context"})
        read |= {"yarn": {"attention_factor"}, "llama3": {"low_freq_factor", "high_freq_factor"}}.get(self.kind, set())
        fields = type(self).model_fields
        # By value: a process is handed all parameters, those at their defaults too.
        if idle := [name for name in fields if name not in read and getattr(self, name) != fields[name].default]:
            raise ValueError(f"{idle[0]} has no effect with kind: {self.kind}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        return self

    def scaling(self, context: int) -> RopeScaling | None:
        """The model's own form of it, for one whose context was `context`; None for no scaling."""
        if self.kind == "none":
            return None
        values = self.model_dump(exclude={"original_context"})
        if self.kind != "llama3":
            values = {name: value for name, value in values.items() if not name.endswith("_freq_factor")}
        return RopeScaling(original_context=self.original_context or context, **values)


class MixtureParams(Params):
    """How much of several datasets of tokens is learned from; the lists are in the order of the inputs."""

    weights: list[PositiveFloat] = Field(
        [], description="Share of the tokens that each gives, in any unit. None: by size, to the power of alpha."
    )
    alpha: float = Field(
        1.0, ge=0, le=1, description="Sizes to this power are the shares: 1 natural proportions, 0 all alike."
    )
    epochs: list[PositiveFloat | None] = Field(
        [], description="Most passes over each; the others then give its part. null, or no list: no limit."
    )
    names: list[str] = Field([], affects="nothing", description="What metrics call them. None: 1, 2, …")

    @model_validator(mode="after")
    def _check(self) -> MixtureParams:
        if self.weights and self.alpha != 1:
            raise ValueError("alpha has no effect with weights")
        if len(set(self.names)) < len(self.names):
            raise ValueError("two datasets have the same name")
        return self


class PretrainParams(TrainParams):
    """A shape left unset is the preset's, or that of the model given as input."""

    # Over 200 steps of the standard library 0.2 nats below cosine: short runs gain from a long high rate.
    schedule: Schedule = Field("wsd", description="Rate after warm-up; `wsd` holds it, then falls linearly.")
    # Together .04 nats below plain Muon on the anchor (benchmarks/RESULTS.md).
    muon_iteration: Literal["newton-schulz", "polar-express"] = Field(
        "polar-express",
        description="Muon: the polynomials that orthogonalise; `polar-express` comes closer (2505.16932).",
    )
    muon_equalise: Literal["none", "rows", "columns", "both"] = Field(
        "rows", description="Muon: bring rows or columns to one norm before orthogonalising (MuonEq, 2603.28254)."
    )
    muon_renormalise: bool = Field(
        True, description="Muon: give each update the norm of an exactly orthogonal matrix (Muon+, 2602.21545)."
    )
    muon_variance: bool = Field(
        True, description="Muon: level the size of a matrix's rows, or of its columns if those are more (NorMuon)."
    )
    preset: str = Field("llama", description="Model family and its default shape: a name that `llmctl models` lists.")
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
    mixture: MixtureParams = Field(MixtureParams(), description="Shares of several datasets of tokens.")
    document_mask: bool = Field(
        True, description="causal: no document in a row sees another; false: a row is read as one text."
    )
    dim: int | None = Field(None, ge=1, description="Width of the hidden states.")
    layers: int | None = Field(None, ge=1, description="Transformer blocks; of an encoder-decoder, its decoder's.")
    encoder_layers: int | None = Field(
        None, ge=1, description="Blocks of an encoder-decoder's encoder. Unset: the preset's, or as many as layers."
    )
    heads: int | None = Field(None, ge=1, description="Query heads.")
    kv_heads: int | None = Field(None, ge=1, description="Key/value heads; each serves heads / kv_heads query heads.")
    ff_dim: int | None = Field(
        None, ge=1, description="Feed-forward width. Unset: 8/3 dim rounded up to 32, or 4 dim where it has no gate."
    )
    context: int | None = Field(None, ge=8, description="Longest sequence in tokens; training rows have this length.")
    window: int | None = Field(
        None, ge=0, description="Tokens that a layer of the kind S sees, its own included. 0: no windows."
    )
    pattern: str | None = Field(
        None,
        pattern="^[LSN]+$",
        description="Kinds of layer, repeated over the depth: L sees all, S a window, N all but without positions.",
    )
    positions: Literal["rope", "learned", "sinusoidal", "t5", "xl", "alibi", "none"] | None = Field(
        None, description="Position encoding in place of the family's, to compare them."
    )
    rope_theta: float | None = Field(None, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScalingParams = Field(RopeScalingParams(), description="Longer contexts with rotary positions.")
    norm_eps: float | None = Field(None, gt=0, description="What norms add to the variance.")
    tie_embeddings: bool | None = Field(None, description="Use the embedding as the output head.")
    qk_norm: bool | None = Field(None, description="Norm each head's query and key, in place of the family's way.")
    qk_gain: float | None = Field(None, gt=0, description="What normed queries and keys are multiplied with.")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] | None = Field(
        None, description="Of the feed-forward layer, in place of the family's; `relu2`: the square of relu."
    )
    gated: bool | None = Field(None, description="Feed-forward layer with a gate, in place of the family's way.")
    value_pattern: str | None = Field(
        None,
        pattern="^[V-]+$",
        description="Layers with V add an embedding of the token to their values, those with - do not; repeated over "
        "the depth.",
    )
    stream_weights: bool | None = Field(
        None, description="Each block reads a weighted sum of what came to it and what entered the first."
    )
    backout: bool | None = Field(None, description="Take a learned share of the middle state off the last one.")
    smear: bool | None = Field(None, description="Each embedding gets a gated share of that of the token before it.")
    logit_softcap: float | None = Field(None, ge=0, description="c of logits c tanh(x / c). 0: off.")

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in preset_names():
            raise ValueError(f"there is no preset {name!r}; {near_presets(name)}")
        if name in PUBLISHED and PUBLISHED[name].elsewhere:
            raise ValueError(f"{name} goes through transformers, it cannot be made afresh: {PUBLISHED[name].elsewhere}")
        return name

    @model_validator(mode="after")
    def _masks(self) -> PretrainParams:
        if self.packing == "none" and not self.document_mask:
            raise ValueError("document_mask has no effect with packing: none")
        return self

    @model_validator(mode="after")
    def _can_be_cut(self) -> PretrainParams:
        ranks = self.parallel.tp
        for name in ("heads", "kv_heads", "ff_dim"):
            if (size := getattr(self, name)) is not None and size % ranks:
                raise ValueError(f"{name} {size} cannot be cut into the {ranks} equal parts of parallel.tp")
        return self

    def required_inputs(self) -> Mapping[str, str]:
        """A model that has zeros, where zeros are kept."""
        return {"model": "keep_zeros"} if self.keep_zeros else {}

    def shape(self) -> dict[str, Any]:
        """The shape parameters that were set."""
        return {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}
