"""What a model is, in numbers: `Traits` set families apart, `ModelConfig` is the shape of one model.

Free of torch, so specs can be checked and sizes computed without it. `llmctl/nn/counts.py` computes those sizes,
`llmctl/nn/families.py` reads and writes Hugging Face's `config.json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from llmctl.errors import UsageError

Kind = Literal["decoder", "encoder", "encoder-decoder"]
Positions = Literal["rope", "learned", "sinusoidal", "t5", "xl", "alibi", "none"]
Head = Literal["lm", "mlm", "pretraining", "features", "classification", "token-classification", "question-answering"]
LABELLED = ("classification", "token-classification")
ENCODER_HEADS = ("mlm", "pretraining", "features", *LABELLED, "question-answering")
DECODER_HEADS = ("lm", "features", *LABELLED)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What sets one family of transformers apart; `llmctl/nn/transformer.py` builds from these and knows no names."""

    kind: Kind = "decoder"
    norm: Literal["rms", "layer", "rms1", "rms0"] = "rms"
    """`rms1`: RMSNorm whose gain is 1 + the stored weight (Gemma); `rms0`: RMSNorm without a gain (nanochat)."""
    order: Literal["pre", "post", "sandwich"] = "pre"
    """Where a sub-layer's norm stands: before it, after the residual sum, or before it and again before the sum."""
    final_norm: bool = True
    embedding_norm: bool = False
    positions: Positions = "rope"
    position_offset: int = 0
    """Rows of the learned table before the first position: RoBERTa's positions start behind its padding id."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """`gelu`: with the exact erf; `gelu_tanh`: its tanh approximation; `relu2`: the square of relu."""
    gated: bool = True
    """down(act(gate x) * up x) (2002.05202), or else down(act(up x))."""
    bias: bool = False
    """Biases in every linear layer of the blocks."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections alone (Qwen2)."""
    qk_norm: bool = False
    """A norm over each head's query and key, before the rotation."""
    scaled: bool = True
    """Scores are divided by the root of the head width; T5's are not."""
    scale_embedding: bool = False
    """Embeddings are multiplied by the root of the model width."""
    scale_tied_head: bool = False
    """States are divided by the root of the model width before a tied head (T5)."""
    classifier: Literal["pooled", "dense", "relu", "last"] = "last"
    """What stands before the classes: the pooler, a layer with tanh or relu, or nothing, on the last token."""
    pooler: bool = False
    """Bare models have a layer with tanh on the first token's state (BERT, RoBERTa)."""
    stream_weights: bool = False
    """Each block reads a x + b x0 instead of x: two learned numbers, x0 what entered the first block (nanochat)."""
    backout: bool = False
    """A learned share of the state behind the middle block is taken off the last one (nanochat)."""
    smear: bool = False
    """Each token's embedding gets a gated share of that of the token before (nanochat)."""
    initial: Literal["small", "zero"] = "small"
    """How fresh weights are drawn: see `initialise`."""


_GPT = Traits(norm="layer", positions="learned", activation="gelu_tanh", gated=False, bias=True)
_BERT = Traits(
    kind="encoder",
    norm="layer",
    order="post",
    final_norm=False,
    embedding_norm=True,
    positions="learned",
    activation="gelu",
    gated=False,
    bias=True,
    classifier="pooled",
    pooler=True,
)
_T5 = Traits(kind="encoder-decoder", positions="t5", activation="relu", gated=False, scaled=False, scale_tied_head=True)
_GEMMA = Traits(norm="rms1", order="sandwich", activation="gelu_tanh", scale_embedding=True)


def _but(traits: Traits, **changes: Any) -> Traits:
    return Traits(**{**asdict(traits), **changes})


TRAITS: dict[str, Traits] = {
    # The twelve of the guide. GPT-3 and Jurassic-1 differ from GPT-2 in the pattern and the shape alone.
    "bert": _BERT,
    "gpt1": _but(_GPT, order="post", final_norm=False),
    "roberta": _but(_BERT, position_offset=2, classifier="dense"),
    "gpt2": _GPT,
    "t5": _T5,
    "gpt3": _GPT,
    "gopher": _but(_GPT, norm="rms", positions="xl"),
    "lamda": Traits(positions="t5", activation="gelu_tanh"),
    "llama": Traits(),
    # What came after, and what transformers has beside them.
    "distilbert": _but(_BERT, classifier="relu", pooler=False),
    "t5v1_1": _but(_T5, activation="gelu_tanh", gated=True),
    "bloom": _but(_GPT, positions="alibi", embedding_norm=True),
    "mistral": Traits(),
    "qwen2": Traits(qkv_bias=True),
    "qwen3": Traits(qk_norm=True),
    "gemma2": _GEMMA,
    "gemma3": _but(_GEMMA, qk_norm=True),
    "phi3": Traits(),
    "smollm3": Traits(),
    # nanochat's, 2026: https://github.com/karpathy/nanochat
    "speedrun": Traits(
        norm="rms0",
        embedding_norm=True,
        activation="relu2",
        gated=False,
        qk_norm=True,
        stream_weights=True,
        backout=True,
        initial="zero",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed to reach beyond `original_context`, the context that was trained.

    `linear`: positions divided by `factor` (2306.15595). `ntk`: base times factor ** (d / (d - 2)). `dynamic`: ntk with
    a factor that grows with the sequence beyond `original_context`. `yarn`: 2309.00071, fast channels kept, slow ones
    interpolated, angles' cos and sin times `attention_factor`. `llama3`: likewise by wavelength.
    """

    kind: Literal["linear", "ntk", "dynamic", "yarn", "llama3"]
    factor: float
    original_context: int
    attention_factor: float = 0.0
    """yarn; 0: 0.1 ln(factor) + 1."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: round the bounds between fast and slow channels outwards to whole channels."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "ntk", "dynamic", "yarn", "llama3"):
            raise UsageError(f"unknown rope_scaling {self.kind!r}", hint="one of linear, ntk, dynamic, yarn, llama3")
        if self.factor < 1 or self.original_context < 1:
            raise UsageError(
                f"rope_scaling: factor {self.factor:g} and original_context {self.original_context} must be at least 1"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UsageError("rope_scaling: high_freq_factor must be larger than low_freq_factor")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one model. Zero for `kv_heads`, `head_dim` and `ff_dim` means the family's usual value.

    Raises UsageError, with what to change, when the numbers do not fit together.
    """

    arch: str
    """The family, a key of TRAITS."""
    vocab_size: int
    dim: int
    layers: int
    """Blocks; of an encoder-decoder, those of the decoder."""
    heads: int
    encoder_layers: int = 0
    """Blocks of the encoder of an encoder-decoder. 0: as many as `layers`."""
    kv_heads: int = 0
    """Key/value heads; each serves `heads / kv_heads` query heads in a row (GQA, arXiv 2305.13245). 0: `heads`."""
    head_dim: int = 0
    """0: `dim / heads`."""
    ff_dim: int = 0
    """Width of the feed-forward layer. 0: 8/3 `dim` rounded up to a multiple of 32 (gated), 4 `dim` (not gated)."""
    context: int = 1024
    """Most tokens of one sequence (`max_position_embeddings`)."""
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    """The output head is the token embedding's own matrix."""
    token_types: int = 0
    """Rows of the table of segments (BERT's token types)."""

    rope_theta: float = 10_000.0
    """Base of the rotary frequencies; without effect where positions are not rotary."""
    local_rope_theta: float = 0.0
    """Base in layers of the kind S, which then know no scaling (Gemma 3). 0: as in the others."""
    rope_scaling: RopeScaling | None = None
    rotary_share: float = 1.0
    """Share of each head's channels that are rotated (Phi-4-mini)."""
    relative_buckets: int = 32
    """T5: rows of the table of relative positions."""
    relative_distance: int = 128
    """T5: distance from which all share the last bucket."""

    window: int = 0
    """Tokens that a layer of the kind S sees, its own included; an encoder's sees so many to either side."""
    pattern: str = ""
    """Kinds of layer, repeated over the depth: L sees all, S a sliding window, N all and without positions.

    GPT-3 alternates dense and banded layers: "LS". Empty: "S" where there is a window, else "L".
    """
    attention_scale: float = 0.0
    """What scores are multiplied with. 0: 1 / sqrt(head_dim), or 1 in families that do not scale."""
    qk_gain: float = 1.0
    """What queries and keys are multiplied with after their norm; scores with its square."""
    value_pattern: str = ""
    """Which layers add an embedding of the token to their values, by a gate for each head (2410.17897), repeated over
    the depth: V does, "-" does not. Empty: none."""
    attention_softcap: float = 0.0
    """c tanh(scores / c); 0: off (Gemma 2)."""
    logit_softcap: float = 0.0

    head: Head | Literal[""] = ""
    """What reads the states. Empty: `mlm` for encoders, else `lm`."""
    labels: tuple[str, ...] = ()
    """Names of the classes of a classification head; their number is its width."""
    dropout: float = 0.0
    """Share of channels zeroed in training: embeddings, attention weights and each sub-layer's output."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    other_eos_ids: tuple[int, ...] = ()
    """Further ids that end a generation, for checkpoints whose `eos_token_id` is a list."""
    decoder_start_id: int | None = None
    """First id that the decoder of an encoder-decoder is given. None: `pad_id`, or 0, as T5 does."""
    traits: Traits = None  # type: ignore[assignment]  # filled in below
    """Left out: the family's."""

    def __post_init__(self) -> None:
        if self.arch not in TRAITS:
            raise UsageError(f"unknown architecture {self.arch!r}", hint=f"one of {', '.join(TRAITS)}")
        for name in ("vocab_size", "dim", "layers", "heads", "context"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("kv_heads", "head_dim", "ff_dim", "encoder_layers", "token_types", "window"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        self._fill()
        self._check_attention()
        self._check_positions()
        self._check_head()

    def _fill(self) -> None:
        if not self.head_dim and self.dim % self.heads:
            raise UsageError(
                f"dim {self.dim} is not divisible by heads {self.heads}",
                hint=f"heads that fit: {_divisors(self.dim)}; or set head_dim",
            )
        traits = TRAITS[self.arch] if self.traits is None else self.traits
        pair = traits.kind == "encoder-decoder"
        head_dim = self.head_dim or self.dim // self.heads
        usual = traits.scaled and math.isclose(self.attention_scale, head_dim**-0.5)
        valued = _shortest((self.value_pattern * self.layers)[: self.layers])
        values = {
            "traits": traits,
            # One spelling for one meaning, so that a configuration read from a file equals the one that was written.
            "attention_scale": 0.0 if usual else self.attention_scale,
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": head_dim,
            "ff_dim": self.ff_dim or (-(-8 * self.dim // (3 * 32)) * 32 if traits.gated else 4 * self.dim),
            "encoder_layers": (self.encoder_layers or self.layers) if pair else self.encoder_layers,
            "pattern": _shortest((self.pattern * self.layers)[: self.layers]) or ("S" if self.window else "L"),
            "value_pattern": "" if valued == "-" else valued,
            "head": self.head or ("mlm" if traits.kind == "encoder" else "lm"),
            "labels": tuple(self.labels),
            "decoder_start_id": (self.pad_id or 0) if pair and self.decoder_start_id is None else self.decoder_start_id,
            "other_eos_ids": tuple(self.other_eos_ids),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_attention(self) -> None:
        if self.heads % self.kv_heads:
            raise UsageError(
                f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}",
                hint=f"kv_heads that fit: {_divisors(self.heads)}",
            )
        if set(self.pattern) - set("LSN"):
            raise UsageError(f"pattern {self.pattern!r} has other letters than L, S and N")
        if ("S" in self.pattern) != bool(self.window):
            problem = "has no window" if "S" in self.pattern else "has a window, but no layer of the kind S"
            raise UsageError(f"the model {problem}: pattern {self.pattern!r}, window {self.window}")
        if self.traits.kind != "encoder-decoder" and self.encoder_layers:
            raise UsageError(f"{self.arch} has no separate encoder, so no encoder_layers")
        if self.norm_eps <= 0:
            raise UsageError(f"norm_eps {self.norm_eps} must be positive")
        if set(self.value_pattern) - set("V-"):
            raise UsageError(f"value_pattern {self.value_pattern!r} has other letters than V and -")
        names = ("stream_weights", "backout", "smear")
        own = {"value_pattern": self.value_pattern, **{name: getattr(self.traits, name) for name in names}}
        odd = [name for name, value in own.items() if value]
        if odd and self.traits.kind != "decoder":
            raise UsageError(f"{odd[0]} is for decoders, {self.arch} is an {self.traits.kind}")
        if self.qk_gain <= 0 or (self.qk_gain != 1 and not self.traits.qk_norm):
            raise UsageError(
                f"qk_gain {self.qk_gain:g} must be positive, and 1 where queries and keys are not normed",
                hint="attention_scale changes the scores of any model",
            )
        for name in ("attention_scale", "attention_softcap", "logit_softcap", "dropout"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.dropout >= 1:
            raise UsageError(f"dropout must be below 1, got {self.dropout}")

    def _check_positions(self) -> None:
        if self.rope_theta <= 0 or self.local_rope_theta < 0:
            raise UsageError(f"rope_theta {self.rope_theta} and local_rope_theta {self.local_rope_theta}: not positive")
        if not 0 < self.rotary_share <= 1:
            raise UsageError(f"rotary_share must be in (0, 1], got {self.rotary_share}")
        if self.traits.positions == "rope" and self.rotary_dim % 2:
            raise UsageError(
                f"{self.rotary_dim} channels of each head are rotated, but rotary positions turn pairs of channels",
                hint="change dim or heads so that dim / heads is even, or set head_dim",
            )
        if self.traits.positions in ("sinusoidal", "xl") and self.dim % 2:
            raise UsageError(f"dim {self.dim} is odd, {self.traits.positions} positions are pairs of sine and cosine")
        if self.rope_scaling is not None and self.traits.positions != "rope":
            raise UsageError(f"rope_scaling has no effect on {self.traits.positions} positions", hint="leave it out")
        buckets = self.relative_buckets // (1 if self.traits.kind == "decoder" else 2)
        if self.traits.positions == "t5" and not (buckets >= 2 and buckets // 2 < self.relative_distance):
            raise UsageError(
                f"relative_buckets {self.relative_buckets} and relative_distance {self.relative_distance} do not fit",
                hint="T5 has 32 and 128; half of the buckets are for single distances, the rest reach out to the last",
            )
        if self.traits.positions == "xl" and self.traits.kind != "decoder":
            raise UsageError("Transformer-XL positions look backward only", hint="choose t5 for an encoder")

    def _check_head(self) -> None:
        allowed: tuple[str, ...] = ENCODER_HEADS if self.traits.kind == "encoder" else DECODER_HEADS
        if self.traits.kind == "encoder-decoder":
            allowed = ("lm",)
        if self.head not in allowed:
            raise UsageError(
                f"a model of the kind {self.traits.kind} has no head {self.head!r}", hint=" or ".join(allowed)
            )
        if (self.head in LABELLED) != bool(self.labels):
            raise UsageError(f"the head {self.head!r} {'needs' if self.head in LABELLED else 'takes no'} labels")
        for name in ("bos_id", "eos_id", "pad_id", "decoder_start_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise UsageError(f"{name} {token} is outside the vocabulary of {self.vocab_size}")

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation."""
        return frozenset(({self.eos_id} if self.eos_id is not None else set()) | set(self.other_eos_ids))

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated."""
        return int(self.head_dim * self.rotary_share)

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return (self.attention_scale or (self.head_dim**-0.5 if self.traits.scaled else 1.0)) * self.qk_gain**2

    @property
    def has_pooler(self) -> bool:
        """Whether a layer with tanh reads the first token's state."""
        pooled = self.head == "classification" and self.traits.classifier == "pooled"
        return self.traits.pooler and (pooled or self.head in ("features", "pretraining"))

    def layer_kind(self, layer: int) -> str:
        """L, S or N: what block number `layer` sees."""
        return self.pattern[layer % len(self.pattern)]

    def has_values(self, layer: int) -> bool:
        """Whether block number `layer` adds an embedding of the token to its values."""
        return bool(self.value_pattern) and self.value_pattern[layer % len(self.value_pattern)] == "V"

    @property
    def gate_channels(self) -> int:
        """Leading channels of the state that a gate over a few heads reads (nanochat's 12)."""
        return min(12, self.dim)

    @property
    def smear_channels(self) -> int:
        """Leading channels of an embedding that the gate of `smear` reads (nanochat's 24)."""
        return min(24, self.dim)

    def layer_window(self, layer: int) -> int:
        """How far block number `layer` sees; 0: everything."""
        return self.window if self.layer_kind(layer) == "S" else 0

    def parameters(self) -> int:
        """The exact number of trainable parameters, a tied head counted once."""
        from llmctl.nn.counts import count

        return count(self).total

    def to_dict(self) -> dict[str, Any]:
        """Plain values, equal to the arguments that make this configuration."""
        values = asdict(self)
        if self.traits == TRAITS[self.arch]:
            del values["traits"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """What `to_dict` was called on; UsageError for a value or name that no configuration has."""
        known = {field.name for field in fields(cls)}
        if set(values) - known:
            raise UsageError(f"a model has no `{min(set(values) - known)}`")
        nested = {"traits": Traits, "rope_scaling": RopeScaling}
        try:
            made = {
                name: nested[name](**value) if name in nested and value is not None else value
                for name, value in values.items()
            }
            return cls(**made)
        except TypeError as error:
            raise UsageError(str(error)) from error


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)


def _shortest(pattern: str) -> str:
    """The shortest string that gives `pattern` when repeated: one spelling for one meaning."""
    whole = (n for n in range(1, len(pattern) + 1) if (pattern[:n] * len(pattern))[: len(pattern)] == pattern)
    return pattern[: next(whole, 0)]
