"""The families that transformers knows: classes, keys, defaults and limits of their `config.json`. Free of torch.

To add one: its `Traits` in `config.py`, an entry here, its names in `names.py`, a row in the parity table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmctl.nn.config import TRAITS, ModelConfig

Values = Mapping[str, Any]


def _nothing(config: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's `config.json` says what a ModelConfig says."""

    model_type: str
    classes: dict[str, str]
    """Head to transformers class."""
    fields: dict[str, str]
    """Their key to our field, where the values are equal."""
    written: dict[str, Any] = field(default_factory=dict)
    """Keys without a field of ours, with the one value that this transformer computes."""
    dropout: tuple[str, ...] = ()
    """Keys that say how much is dropped in training; written from ours, never read."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What transformers takes when a key is left out, where that differs from ours."""
    refused: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Features of transformers that would change the logits: key to the values that mean "off"."""
    options: frozenset[str] = frozenset()
    """Fields of ours that the family can express beside `fields`."""
    letters: str = "L"
    """Kinds of layer it can have."""
    layer_types: bool = False
    """Whether it lists the kind of each layer; without, all are alike."""
    context: int = 1024
    """Of families whose files say nothing of it."""
    pattern: Callable[[Values, int], str] = lambda config, layers: "S"
    """The kinds of layer where a file does not list them."""
    read: Callable[[Values], dict[str, Any]] = _nothing
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing
    refuses: Callable[[ModelConfig], bool] = lambda config: False
    """What else of ours it cannot express."""
    matches: Callable[[Values], bool] = lambda config: True
    """Tells families of one class apart."""

    @property
    def windows(self) -> bool:
        """Whether layers may have a sliding window."""
        return "S" in self.letters

    def lacks(self, config: ModelConfig) -> bool:
        """Whether transformers cannot express this configuration of the family."""
        neutral = {
            "kv_heads": config.heads,
            "head_dim": config.dim // config.heads,
            "rope_scaling": None,
            "rotary_share": 1.0,
            "local_rope_theta": 0.0,
            "attention_scale": 0.0,
            "attention_softcap": 0.0,
            "logit_softcap": 0.0,
            "token_types": 0,
            "ff_dim": 4 * config.dim,
        }
        known = {*self.fields.values(), *self.options}
        odd = any(getattr(config, name) != value for name, value in neutral.items() if name not in known)
        pattern = set(config.pattern) <= set(self.letters) and (self.layer_types or len(config.pattern) == 1)
        changed = config.traits != TRAITS[config.arch] or config.head not in self.classes
        scaling = (
            config.rope_scaling is not None
            and config.rope_scaling.kind == "dynamic"
            and (config.context != int(config.rope_scaling.original_context * config.rope_scaling.factor))
        )
        return odd or changed or not pattern or scaling or self.refuses(config)


def _classes(name: str, lm: str = "ForCausalLM", tokens: bool = True, model: str = "") -> dict[str, str]:
    more = {"token-classification": f"{name}ForTokenClassification"} if tokens else {}
    return {
        "lm": name + lm,
        "classification": f"{name}ForSequenceClassification",
        "features": f"{model or name}Model",
        **more,
    }


def _encoder_classes(name: str) -> dict[str, str]:
    return {
        "mlm": f"{name}ForMaskedLM",
        "features": f"{name}Model",
        "classification": f"{name}ForSequenceClassification",
        "token-classification": f"{name}ForTokenClassification",
        "question-answering": f"{name}ForQuestionAnswering",
    }


_OFF = (None, False)
_SCALED = frozenset({"rope_scaling"})
_LLAMA_FIELDS = {
    "head_dim": "head_dim",
    "hidden_size": "dim",
    "intermediate_size": "ff_dim",
    "max_position_embeddings": "context",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "norm_eps",
}
_GPT_FIELDS = {
    "layer_norm_epsilon": "norm_eps",
    "n_embd": "dim",
    "n_head": "heads",
    "n_layer": "layers",
    "n_positions": "context",
}
_BERT_FIELDS = {
    "hidden_size": "dim",
    "intermediate_size": "ff_dim",
    "layer_norm_eps": "norm_eps",
    "max_position_embeddings": "context",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "type_vocab_size": "token_types",
}
_SILU = {"hidden_act": ("silu",), "attention_bias": _OFF, "mlp_bias": _OFF, "partial_rotary_factor": (None, 1.0)}
_LLAMA_DEFAULTS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_ATTENTION = ("attention_dropout",)
_GPT_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
_BERT_DROPOUT = ("attention_probs_dropout_prob", "hidden_dropout_prob")


def _qwen_pattern(config: Values, layers: int) -> str:
    """Qwen's windows are off unless asked for, and then begin after `max_window_layers`."""
    if not config.get("use_sliding_window"):
        return "L" * layers
    full = min(layers, config.get("max_window_layers", 28))
    return "L" * full + "S" * (layers - full)


def _gemma3_pattern(config: Values, layers: int) -> str:
    every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    return ("S" * (every - 1) + "L") * layers


def _read_gemma(config: Values) -> dict[str, Any]:
    values = {
        "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": config.get("final_logit_softcapping", 30.0) or 0.0,
        "attention_softcap": config.get("attn_logit_softcapping", 50.0) or 0.0,
    }
    if config.get("model_type") == "gemma3_text":
        values["local_rope_theta"] = config.get("rope_local_base_freq", 10_000.0)
        for ours, theirs in (
            ("logit_softcap", "final_logit_softcapping"),
            ("attention_softcap", "attn_logit_softcapping"),
        ):
            values[ours] = config.get(theirs) or 0.0
    return values


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    scalar = config.scale**-2
    values = {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "final_logit_softcapping": config.logit_softcap or None,
        "attn_logit_softcapping": config.attention_softcap or None,
    }
    if config.arch == "gemma3":
        values["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
    return values


def _read_nope(config: Values) -> dict[str, Any]:
    """SmolLM3: which layers have no positions (0 in `no_rope_layers`)."""
    layers, listed = config.get("num_hidden_layers", 36), config.get("no_rope_layers")
    every = config.get("no_rope_layer_interval", 4)
    listed = listed or [int((layer + 1) % every != 0) for layer in range(layers)]
    return {"pattern": "".join("L" if rotated else "N" for rotated in listed)}


def _write_nope(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_types": ["full_attention"] * config.layers,
        "no_rope_layers": [int(config.layer_kind(layer) != "N") for layer in range(config.layers)],
        "sliding_window": None,
        "use_sliding_window": False,
    }


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    kinds = [config.layer_kind(layer) for layer in range(config.layers)]
    return {
        "use_sliding_window": bool(config.window),
        "max_window_layers": kinds.index("S") if "S" in kinds else config.layers,
    }


def _read_t5(config: Values) -> dict[str, Any]:
    return {"decoder_start_id": config.get("decoder_start_token_id")}


def _write_t5(config: ModelConfig) -> dict[str, Any]:
    act = "gated-gelu" if config.traits.gated else "relu"
    return {
        "decoder_start_token_id": config.decoder_start_id,
        "dense_act_fn": "gelu_new" if config.traits.gated else "relu",
        "feed_forward_proj": act,
        "is_encoder_decoder": True,
        "is_gated_act": config.traits.gated,
    }


def _t5(gated: bool) -> Family:
    return Family(
        model_type="t5",
        classes={"lm": "T5ForConditionalGeneration"},
        fields={
            "d_ff": "ff_dim",
            "d_kv": "head_dim",
            "d_model": "dim",
            "layer_norm_epsilon": "norm_eps",
            "n_positions": "context",
            "num_decoder_layers": "layers",
            "num_heads": "heads",
            "num_layers": "encoder_layers",
            "relative_attention_max_distance": "relative_distance",
            "relative_attention_num_buckets": "relative_buckets",
        },
        dropout=("dropout_rate",),
        defaults={
            "d_ff": 2048,
            "d_kv": 64,
            "d_model": 512,
            "eos_token_id": 1,
            "layer_norm_epsilon": 1e-6,
            "n_positions": 512,
            "num_heads": 8,
            "num_layers": 6,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "vocab_size": 32128,
        },  # fmt: skip
        read=lambda config: {
            **_read_t5(config),
            "layers": config.get("num_decoder_layers") or config.get("num_layers", 6),
        },
        write=_write_t5,
        matches=lambda config: (
            (config.get("feed_forward_proj", "relu") == "gated-gelu") == gated
            and config.get("feed_forward_proj", "relu") in ("relu", "gated-gelu")
        ),
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        classes=_classes("Llama"),
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_act": "silu", "mlp_bias": False},
        dropout=_ATTENTION,
        defaults=_LLAMA_DEFAULTS,
        refused=_SILU,
        options=_SCALED,
    ),
    "mistral": Family(
        model_type="mistral",
        classes=_classes("Mistral"),
        fields=_LLAMA_FIELDS,
        written={"hidden_act": "silu"},
        dropout=_ATTENTION,
        defaults={**_LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        refused={"hidden_act": ("silu",)},
        options=_SCALED,
        letters="LS",
    ),
    "qwen2": Family(
        model_type="qwen2",
        classes=_classes("Qwen2"),
        fields=_LLAMA_FIELDS,
        written={"hidden_act": "silu"},
        dropout=_ATTENTION,
        defaults=_QWEN_DEFAULTS,
        refused={"hidden_act": ("silu",)},
        options=_SCALED,
        letters="LS",
        layer_types=True,
        pattern=_qwen_pattern,
        write=_write_qwen,
    ),
    "qwen3": Family(
        model_type="qwen3",
        classes=_classes("Qwen3"),
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_act": "silu"},
        dropout=_ATTENTION,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        refused={"attention_bias": _OFF, "hidden_act": ("silu",)},
        options=_SCALED,
        letters="LS",
        layer_types=True,
        pattern=_qwen_pattern,
        write=_write_qwen,
    ),
    "phi3": Family(
        model_type="phi3",
        classes=_classes("Phi3"),
        fields={**_LLAMA_FIELDS, "partial_rotary_factor": "rotary_share"},
        written={"hidden_act": "silu"},
        dropout=("attention_dropout", "embd_pdrop", "resid_pdrop"),
        defaults={
            "bos_token_id": 1, "eos_token_id": 32000, "max_position_embeddings": 4096, "pad_token_id": 32000,
            "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        },  # fmt: skip
        refused={"hidden_act": ("silu",)},
        letters="LS",
        write=lambda config: {"original_max_position_embeddings": config.context},
    ),
    "smollm3": Family(
        model_type="smollm3",
        classes=_classes("SmolLM3"),
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_act": "silu", "mlp_bias": False},
        dropout=_ATTENTION,
        defaults={
            "bos_token_id": 128000, "eos_token_id": 128001, "max_position_embeddings": 32768, "num_key_value_heads": 4,
            "pad_token_id": 128004, "rms_norm_eps": 1e-6, "rope_theta": 2e6, "tie_word_embeddings": True,
        },  # fmt: skip
        refused={**_SILU, "use_sliding_window": _OFF},
        options=_SCALED,
        letters="LN",
        layer_types=True,
        read=_read_nope,
        write=_write_nope,
    ),
    "gemma2": Family(
        model_type="gemma2",
        classes=_classes("Gemma2"),
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"},
        dropout=_ATTENTION,
        defaults={
            "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "max_position_embeddings": 8192, "num_key_value_heads": 4,
            "pad_token_id": 0, "rms_norm_eps": 1e-6, "sliding_window": 4096, "tie_word_embeddings": True,
        },  # fmt: skip
        refused={"attention_bias": _OFF, "hidden_activation": (None, "gelu_pytorch_tanh")},
        options=frozenset({"attention_scale", "attention_softcap", "logit_softcap"}),
        letters="LS",
        layer_types=True,
        pattern=lambda config, layers: "SL" * layers,
        read=_read_gemma,
        write=_write_gemma,
    ),
    "gemma3": Family(
        model_type="gemma3_text",
        classes={
            "lm": "Gemma3ForCausalLM",
            "classification": "Gemma3TextForSequenceClassification",
            "features": "Gemma3TextModel",
        },
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
        dropout=_ATTENTION,
        defaults={
            "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "max_position_embeddings": 131072,
            "num_key_value_heads": 4, "pad_token_id": 0, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 4096,
            "tie_word_embeddings": True,
        },  # fmt: skip
        refused={
            "attention_bias": _OFF,
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": _OFF,
        },
        options=frozenset({"attention_scale", "attention_softcap", "local_rope_theta", "logit_softcap", "rope_scaling"}),
        letters="LS",
        layer_types=True,
        pattern=_gemma3_pattern,
        read=_read_gemma,
        write=_write_gemma,
    ),
    "gpt1": Family(
        model_type="openai-gpt",
        classes=_classes("OpenAIGPT", "LMHeadModel", tokens=False),
        fields=_GPT_FIELDS,
        written={"afn": "gelu"},
        dropout=_GPT_DROPOUT,
        defaults={
            "layer_norm_epsilon": 1e-5, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512, "vocab_size": 40478,
        },  # fmt: skip
        refused={"afn": ("gelu",)},
    ),
    "gpt2": Family(
        model_type="gpt2",
        classes=_classes("GPT2", "LMHeadModel"),
        fields={**_GPT_FIELDS, "n_inner": "ff_dim"},
        written={"activation_function": "gelu_new"},
        dropout=_GPT_DROPOUT,
        defaults={
            "bos_token_id": 50256, "eos_token_id": 50256, "layer_norm_epsilon": 1e-5, "n_embd": 768, "n_head": 12,
            "n_layer": 12, "n_positions": 1024, "tie_word_embeddings": True, "vocab_size": 50257,
        },  # fmt: skip
        refused={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "add_cross_attention": _OFF,
            "scale_attn_by_inverse_layer_idx": _OFF,
            "scale_attn_weights": (True,),
        },
    ),
    "bloom": Family(
        model_type="bloom",
        classes=_classes("Bloom"),
        fields={"hidden_size": "dim", "layer_norm_epsilon": "norm_eps", "n_head": "heads", "n_layer": "layers", "seq_length": "context"},
        written={"apply_residual_connection_post_layernorm": False},
        dropout=("attention_dropout", "hidden_dropout"),
        defaults={
            "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 64, "layer_norm_epsilon": 1e-5, "n_head": 8, "n_layer": 2,
            "seq_length": 2048, "vocab_size": 250880,
        },  # fmt: skip
        refused={"apply_residual_connection_post_layernorm": _OFF},
    ),
    "bert": Family(
        model_type="bert",
        classes={"pretraining": "BertForPreTraining", **_encoder_classes("Bert")},
        fields=_BERT_FIELDS,
        written={"hidden_act": "gelu", "position_embedding_type": "absolute"},
        dropout=_BERT_DROPOUT,
        defaults={
            "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
            "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30522,
        },  # fmt: skip
        refused={
            "add_cross_attention": _OFF, "hidden_act": ("gelu",), "is_decoder": _OFF,
            "position_embedding_type": (None, "absolute"),
        },  # fmt: skip
    ),
    "roberta": Family(
        model_type="roberta",
        classes=_encoder_classes("Roberta"),
        fields=_BERT_FIELDS,
        written={"hidden_act": "gelu", "position_embedding_type": "absolute"},
        dropout=_BERT_DROPOUT,
        defaults={
            "bos_token_id": 0, "eos_token_id": 2, "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
            "type_vocab_size": 2, "vocab_size": 50265,
        },  # fmt: skip
        write=lambda config: {"pad_token_id": 1},
        refuses=lambda config: config.pad_id not in (None, 1),
        refused={
            "add_cross_attention": _OFF, "hidden_act": ("gelu",), "is_decoder": _OFF, "pad_token_id": (1,),
            "position_embedding_type": (None, "absolute"),
        },  # fmt: skip
    ),
    "distilbert": Family(
        model_type="distilbert",
        classes=_encoder_classes("DistilBert"),
        fields={"dim": "dim", "hidden_dim": "ff_dim", "max_position_embeddings": "context", "n_heads": "heads", "n_layers": "layers"},
        written={"activation": "gelu", "sinusoidal_pos_embds": False},
        dropout=("attention_dropout", "dropout", "qa_dropout", "seq_classif_dropout"),
        defaults={
            "dim": 768, "hidden_dim": 3072, "max_position_embeddings": 512, "n_heads": 12, "n_layers": 6, "pad_token_id": 0,
            "vocab_size": 30522,
        },  # fmt: skip
        refused={"activation": ("gelu",)},
        read=lambda config: {"norm_eps": 1e-12},
        refuses=lambda config: config.norm_eps != 1e-12,
    ),
    "t5": _t5(gated=False),
    "t5v1_1": _t5(gated=True),
}  # fmt: skip
