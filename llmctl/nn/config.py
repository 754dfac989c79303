"""What a model is, in numbers: `ModelConfig`, its exact parameter count, each family's Hugging Face `config.json`.

Free of torch, so specs can be checked and sizes computed without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmctl.errors import InputError, LlmctlError, UsageError


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What sets one family of transformers apart; `llmctl/nn/transformer.py` builds from these and knows no names."""

    norm: Literal["rms", "layer"]
    positions: Literal["rope", "learned"]
    ffn: Literal["swiglu", "gelu"]
    """`swiglu`: down(silu(gate x) * up x); `gelu`: down(gelu_tanh(up x))."""
    bias: bool
    qk_norm: bool = False
    """RMSNorm over each head's query and key before the rotation (Qwen3)."""


TRAITS: dict[str, Traits] = {
    "llama": Traits(norm="rms", positions="rope", ffn="swiglu", bias=False),
    "qwen3": Traits(norm="rms", positions="rope", ffn="swiglu", bias=False, qk_norm=True),
    "gpt2": Traits(norm="layer", positions="learned", ffn="gelu", bias=True),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one model. Zero for `kv_heads`, `head_dim` and `ff_dim` means the family's usual value.

    Raises UsageError, with what to change, when the numbers do not fit together.
    """

    arch: Literal["llama", "qwen3", "gpt2"]
    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int = 0
    """Key/value heads; each serves `heads / kv_heads` query heads in a row (GQA, arXiv 2305.13245). 0: `heads`."""
    head_dim: int = 0
    """0: `dim / heads`."""
    ff_dim: int = 0
    """Width of the feed-forward layer. 0: 8/3 `dim` rounded up to a multiple of 32 (swiglu), 4 `dim` (gelu)."""
    context: int = 1024
    """Most tokens of one sequence (`max_position_embeddings`)."""
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies; without effect where positions are learned."""
    tie_embeddings: bool = True
    """The output head is the token embedding's own matrix."""
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    other_eos_ids: tuple[int, ...] = ()
    """Further ids that end a generation, for checkpoints whose `eos_token_id` is a list."""

    def __post_init__(self) -> None:
        if self.arch not in TRAITS:
            raise UsageError(f"unknown architecture {self.arch!r}", hint=f"one of {', '.join(TRAITS)}")
        for name in ("vocab_size", "dim", "layers", "heads", "context"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("kv_heads", "head_dim", "ff_dim"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        self._fill()
        self._check()

    def _fill(self) -> None:
        if not self.head_dim and self.dim % self.heads:
            raise UsageError(
                f"dim {self.dim} is not divisible by heads {self.heads}",
                hint=f"heads that fit: {_divisors(self.dim)}; or set head_dim",
            )
        usual_ff = 4 * self.dim if self.traits.ffn == "gelu" else -(-8 * self.dim // (3 * 32)) * 32
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.heads)
        object.__setattr__(self, "ff_dim", self.ff_dim or usual_ff)
        object.__setattr__(self, "other_eos_ids", tuple(self.other_eos_ids))

    def _check(self) -> None:
        if self.heads % self.kv_heads:
            raise UsageError(
                f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}",
                hint=f"kv_heads that fit: {_divisors(self.heads)}",
            )
        if self.traits.positions == "rope" and self.head_dim % 2:
            raise UsageError(
                f"head_dim {self.head_dim} is odd, rotary positions turn pairs of channels",
                hint="change dim or heads so that dim / heads is even, or set head_dim",
            )
        if self.arch == "gpt2" and (self.kv_heads != self.heads or self.head_dim * self.heads != self.dim):
            raise UsageError(
                f"gpt2 has kv_heads = heads and head_dim = dim / heads, got heads {self.heads}, "
                f"kv_heads {self.kv_heads}, head_dim {self.head_dim}",
                hint="leave kv_heads and head_dim out, or use the architecture llama",
            )
        if self.norm_eps <= 0 or self.rope_theta <= 0:
            raise UsageError(f"norm_eps {self.norm_eps} and rope_theta {self.rope_theta} must be positive")
        for name in ("bos_id", "eos_id", "pad_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise UsageError(f"{name} {token} is outside the vocabulary of {self.vocab_size}")

    @property
    def traits(self) -> Traits:
        """The family's traits."""
        return TRAITS[self.arch]

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation."""
        return frozenset(({self.eos_id} if self.eos_id is not None else set()) | set(self.other_eos_ids))

    def parameters(self) -> int:
        """The exact number of trainable parameters, a tied head counted once."""
        return self.vocab_size * self.dim + self.hidden_parameters() + self.unembedding_parameters()

    def unembedding_parameters(self) -> int:
        """Parameters of the output head that are not the token embedding's."""
        return 0 if self.tie_embeddings else self.vocab_size * self.dim

    def hidden_parameters(self) -> int:
        """Parameters between the token embedding and the head: positions, blocks, final norm."""
        traits, dim = self.traits, self.dim
        norm = dim * (2 if traits.norm == "layer" else 1)
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = dim * (q_dim + 2 * kv_dim) + q_dim * dim
        ffn = (3 if traits.ffn == "swiglu" else 2) * dim * self.ff_dim
        if traits.bias:
            attention += q_dim + 2 * kv_dim + dim
            ffn += self.ff_dim + dim
        if traits.qk_norm:
            attention += 2 * self.head_dim
        positions = self.context * dim if traits.positions == "learned" else 0
        return positions + self.layers * (attention + ffn + 2 * norm) + norm

    def to_dict(self) -> dict[str, Any]:
        """Plain values, equal to the arguments that make this configuration."""
        return {**asdict(self), "other_eos_ids": list(self.other_eos_ids)}

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of transformers 4.57 for this model."""
        eos: Any = self.eos_id
        if self.other_eos_ids:
            eos = [*([] if self.eos_id is None else [self.eos_id]), *self.other_eos_ids]
        common = {
            "architectures": [HF_CLASSES[self.arch]],
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "initializer_range": 0.02,
            "model_type": self.arch,
            "pad_token_id": self.pad_id,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        fields = {hf: getattr(self, ours) for hf, ours in _HF_FIELDS[self.arch].items()}
        return dict(sorted({**common, **_HF_WRITTEN[self.arch], **fields}.items()))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`; keys left out mean what transformers takes them to mean.

        Raises InputError for an architecture or a feature that this transformer does not have, naming it.
        """
        arch = _hf_arch(config)
        _refuse_unsupported(arch, config)
        defaults = _HF_DEFAULTS[arch]
        values: dict[str, Any] = {}
        for hf, ours in _HF_FIELDS[arch].items():
            value = config.get(hf, defaults.get(hf))
            # null is transformers' way to say "the usual": n_inner, num_key_value_heads, head_dim.
            values[ours] = 0 if value is None and ours in ("kv_heads", "head_dim", "ff_dim") else value
        values["rope_theta"] = _rope_theta(config)
        eos = config.get("eos_token_id", defaults.get("eos_token_id"))
        eos_ids: list[int] = [eos] if isinstance(eos, int) else list(eos or ())
        missing = [hf for hf, ours in _HF_FIELDS[arch].items() if values[ours] is None and ours != "rope_theta"]
        if missing or "vocab_size" not in {*config, *defaults}:
            raise InputError(f"config.json lacks `{(missing or ['vocab_size'])[0]}`")
        try:
            return cls(
                arch=arch,  # type: ignore[arg-type]  # _hf_arch returns a key of TRAITS
                vocab_size=config.get("vocab_size", defaults.get("vocab_size")),
                tie_embeddings=config.get("tie_word_embeddings", defaults["tie_word_embeddings"]),
                bos_id=config.get("bos_token_id", defaults.get("bos_token_id")),
                eos_id=eos_ids[0] if eos_ids else None,
                pad_id=config.get("pad_token_id"),
                other_eos_ids=tuple(eos_ids[1:]),
                **values,
            )
        except (LlmctlError, TypeError) as error:
            hint = error.hint if isinstance(error, LlmctlError) else None
            raise InputError(f"config.json describes no valid model: {error}", hint=hint) from error


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)


HF_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
"""Our name of a family to the `architectures` entry of its `config.json`."""

_LLAMA_FIELDS = {
    "head_dim": "head_dim",
    "hidden_size": "dim",
    "intermediate_size": "ff_dim",
    "max_position_embeddings": "context",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
_GPT2_FIELDS = {
    "layer_norm_epsilon": "norm_eps",
    "n_embd": "dim",
    "n_head": "heads",
    "n_inner": "ff_dim",
    "n_layer": "layers",
    "n_positions": "context",
}
_HF_FIELDS = {"llama": _LLAMA_FIELDS, "qwen3": _LLAMA_FIELDS, "gpt2": _GPT2_FIELDS}

# Keys without a field of ours, written with the one value that this transformer computes.
_HF_WRITTEN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False},
    "qwen3": {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "use_sliding_window": False},
    "gpt2": {"activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}

# What transformers takes when a key is left out, where that differs from ours.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "layer_norm_epsilon": 1e-5,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "tie_word_embeddings": True,
        "vocab_size": 50257,
    },
}

# Features of transformers that would change the logits: key -> the values that mean "off".
_OFF = (None, False)
_HF_REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"attention_bias": _OFF, "hidden_act": ("silu",), "mlp_bias": _OFF, "partial_rotary_factor": (None, 1.0)},
    "qwen3": {"attention_bias": _OFF, "hidden_act": ("silu",), "use_sliding_window": _OFF},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "add_cross_attention": _OFF,
        "scale_attn_by_inverse_layer_idx": _OFF,
        "scale_attn_weights": (True,),
    },
}


def _hf_arch(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    for arch, hf_class in HF_CLASSES.items():
        if hf_class in names:
            return arch
    raise InputError(
        f"`architectures` in config.json is {list(names)}, not one of {', '.join(HF_CLASSES.values())}",
        hint="export-onnx takes other architectures through Optimum; training needs one of these",
    )


def _refuse_unsupported(arch: str, config: Mapping[str, Any]) -> None:
    for key, allowed in {**_HF_REFUSED[arch], "quantization_config": (None,)}.items():
        if key in config and config[key] not in allowed:
            raise InputError(
                f"config.json sets `{key}` to {config[key]!r}, which llmctl's {arch} does not compute",
                hint=f"supported: {allowed[-1]!r}",
            )
    layer_types = set(config.get("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise InputError(f"config.json sets `layer_types` to {sorted(layer_types)}, llmctl has full attention only")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base; transformers 4 keeps it beside `rope_scaling`, transformers 5 within `rope_parameters`."""
    theta = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(
                f"config.json sets `{key}` to type {kind!r}, which llmctl does not compute",
                hint="supported: rotary positions without scaling",
            )
        theta = rope.get("rope_theta", theta)
    return 10_000.0 if theta is None else float(theta)
