"""The families in LLaMA's line, as transformers' `config.json` has them. Free of torch."""

from __future__ import annotations

from typing import Any

from llmctl.nn.config import ModelConfig
from llmctl.nn.family import OFF, Family, Values, decoder_classes

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
_SILU = {"hidden_act": ("silu",), "attention_bias": OFF, "mlp_bias": OFF, "partial_rotary_factor": (None, 1.0)}
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


def _qwen_pattern(config: Values, layers: int) -> str:
    """Qwen's windows are off unless asked for, and then begin after `max_window_layers`."""
    if not config.get("use_sliding_window"):
        return "L" * layers
    full = min(layers, int(config.get("max_window_layers", 28)))
    return "L" * full + "S" * (layers - full)


def _gemma3_pattern(config: Values, layers: int) -> str:
    every = int(config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)))
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


LLAMA_LINE: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        classes=decoder_classes("Llama"),
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_act": "silu", "mlp_bias": False},
        dropout=_ATTENTION,
        defaults=_LLAMA_DEFAULTS,
        refused=_SILU,
        options=_SCALED,
    ),
    "mistral": Family(
        model_type="mistral",
        classes=decoder_classes("Mistral"),
        fields=_LLAMA_FIELDS,
        written={"hidden_act": "silu"},
        dropout=_ATTENTION,
        defaults={
            **_LLAMA_DEFAULTS,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        refused={"hidden_act": ("silu",)},
        options=_SCALED,
        letters="LS",
    ),
    "qwen2": Family(
        model_type="qwen2",
        classes=decoder_classes("Qwen2"),
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
        classes=decoder_classes("Qwen3"),
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_act": "silu"},
        dropout=_ATTENTION,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        refused={"attention_bias": OFF, "hidden_act": ("silu",)},
        options=_SCALED,
        letters="LS",
        layer_types=True,
        pattern=_qwen_pattern,
        write=_write_qwen,
    ),
    "phi3": Family(
        model_type="phi3",
        classes=decoder_classes("Phi3"),
        fields={**_LLAMA_FIELDS, "partial_rotary_factor": "rotary_share"},
        written={"hidden_act": "silu"},
        dropout=("attention_dropout", "embd_pdrop", "resid_pdrop"),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        refused={"hidden_act": ("silu",)},
        letters="LS",
        write=lambda config: {"original_max_position_embeddings": config.context},
    ),
    "smollm3": Family(
        model_type="smollm3",
        classes=decoder_classes("SmolLM3"),
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_act": "silu", "mlp_bias": False},
        dropout=_ATTENTION,
        defaults={
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "pad_token_id": 128004,
            "rms_norm_eps": 1e-6,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        refused={**_SILU, "use_sliding_window": OFF},
        options=_SCALED,
        letters="LN",
        layer_types=True,
        read=_read_nope,
        write=_write_nope,
    ),
    "gemma2": Family(
        model_type="gemma2",
        classes=decoder_classes("Gemma2"),
        fields=_LLAMA_FIELDS,
        written={"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"},
        dropout=_ATTENTION,
        defaults={
            "bos_token_id": 2,
            "eos_token_id": 1,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        refused={"attention_bias": OFF, "hidden_activation": (None, "gelu_pytorch_tanh")},
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
        written={
            "attention_bias": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "use_bidirectional_attention": False,
        },
        dropout=_ATTENTION,
        defaults={
            "bos_token_id": 2,
            "eos_token_id": 1,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        refused={
            "attention_bias": OFF,
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": OFF,
        },
        options=frozenset(
            {"attention_scale", "attention_softcap", "local_rope_theta", "logit_softcap", "rope_scaling"}
        ),
        letters="LS",
        layer_types=True,
        pattern=_gemma3_pattern,
        read=_read_gemma,
        write=_write_gemma,
    ),
}
