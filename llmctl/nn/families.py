"""Hugging Face's `config.json`, both ways, for every family that transformers has and ours computes. Free of torch.

A configuration that transformers cannot express (GPT-3's banded layers, Gopher's positions, any trait changed) is
written in our own words under the model type `llmctl`: the usual keys for other tools, and all of it for us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.errors import InputError, LlmctlError
from llmctl.nn.classic_families import CLASSIC
from llmctl.nn.config import TRAITS, ModelConfig
from llmctl.nn.family import Family
from llmctl.nn.llama_families import LLAMA_LINE
from llmctl.nn.rope_config import read_rope, write_rope

FAMILIES: dict[str, Family] = {**CLASSIC, **LLAMA_LINE}
"""Those that transformers has, by our name."""
OWN_CLASS = "LlmctlTransformer"
OWN_TYPE = "llmctl"
_PATTERN_LETTERS = {"full_attention": "L", "sliding_attention": "S"}
_PATTERN_NAMES = {"L": "full_attention", "S": "sliding_attention", "N": "full_attention"}


def in_transformers(config: ModelConfig) -> bool:
    """Whether transformers has a class that computes this model."""
    family = FAMILIES.get(config.arch)
    return family is not None and not family.lacks(config)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of this model: transformers 4.57's where it has the family, else our own."""
    eos: Any = config.eos_id
    if config.other_eos_ids:
        eos = [*([] if config.eos_id is None else [config.eos_id]), *config.other_eos_ids]
    common = {
        "bos_token_id": config.bos_id,
        "eos_token_id": eos,
        "initializer_range": 0.02,
        "pad_token_id": config.pad_id,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.labels:
        common["id2label"] = {str(number): label for number, label in enumerate(config.labels)}
        common["label2id"] = {label: number for number, label in enumerate(config.labels)}
    if not in_transformers(config):
        return dict(sorted({**common, **_own(config)}.items()))
    family = FAMILIES[config.arch]
    fields = {hf: getattr(config, ours) for hf, ours in family.fields.items()}
    for hf, ours in family.fields.items():
        if ours == "context":
            fields[hf] += config.traits.position_offset
    names = {"architectures": [family.classes[config.head]], "model_type": family.model_type}
    dropout = dict.fromkeys(family.dropout, config.dropout)
    extra = {**_write_pattern(family, config), **(write_rope(config) if config.traits.positions == "rope" else {})}
    return dict(
        sorted({**common, **names, **family.written, **dropout, **fields, **extra, **family.write(config)}.items())
    )


def _own(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [OWN_CLASS],
        "head_dim": config.head_dim,
        "hidden_size": config.dim,
        "intermediate_size": config.ff_dim,
        "is_encoder_decoder": config.traits.kind == "encoder-decoder",
        "llmctl": config.to_dict(),
        "max_position_embeddings": config.context,
        "model_type": OWN_TYPE,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
    }


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a `config.json`; keys left out mean what transformers takes them to mean.

    Dropout is not read: how much of it a further training uses is that training's own parameter. Raises InputError for
    an architecture or a feature that this transformer does not have, naming it.
    """
    names = list(config.get("architectures") or [])
    try:
        if OWN_CLASS in names:
            return ModelConfig.from_dict(config.get("llmctl") or {})
        arch, head = _class_of(names, config)
        return _read(arch, head, config)
    except InputError:
        raise
    except (LlmctlError, TypeError, ValueError) as error:
        hint = error.hint if isinstance(error, LlmctlError) else None
        raise InputError(f"config.json describes no valid model: {error}", hint=hint) from error


def _class_of(names: list[str], config: Mapping[str, Any]) -> tuple[str, str]:
    """The family and the head that a transformers class stands for."""
    for arch, family in FAMILIES.items():
        for head, name in family.classes.items():
            if name in names and family.matches(config):
                return arch, head
    # T5 and its gated sibling have one class.
    known = ", ".join(dict.fromkeys(f.classes.get("lm") or f.classes["mlm"] for f in FAMILIES.values()))
    raise InputError(
        f"`architectures` in config.json is {names}, which llmctl's own transformer does not compute",
        hint=f"it computes {known} and their heads; other models go through transformers",
    )


def _read(arch: str, head: str, config: Mapping[str, Any]) -> ModelConfig:
    family = FAMILIES[arch]
    _refuse_unsupported(arch, config)
    values: dict[str, Any] = {}
    for hf, ours in family.fields.items():
        value = config.get(hf, family.defaults.get(hf))
        # null is transformers' way to say "the usual": n_inner, num_key_value_heads, head_dim.
        values[ours] = 0 if value is None and ours in ("kv_heads", "head_dim", "ff_dim", "encoder_layers") else value
    missing = [hf for hf, ours in family.fields.items() if values[ours] is None]
    if missing or "vocab_size" not in {**config, **family.defaults}:
        raise InputError(f"config.json lacks `{(missing or ['vocab_size'])[0]}`")
    values["context"] = values.get("context", family.context) - TRAITS[arch].position_offset
    if TRAITS[arch].positions == "rope":
        values |= read_rope(config, family.defaults, values)
    values |= _read_pattern(family, config, values["layers"])
    values |= family.read(config)
    return ModelConfig(
        arch=arch,
        head=head,  # type: ignore[arg-type]  # a key of the family's classes
        vocab_size=config.get("vocab_size", family.defaults.get("vocab_size")),
        tie_embeddings=config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings", True)),
        labels=_labels(head, config),
        **values,
        **_ids(family, config),
    )


def _ids(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    eos = config.get("eos_token_id", family.defaults.get("eos_token_id"))
    eos_ids: list[int] = [eos] if isinstance(eos, int) else list(eos or ())
    return {
        "bos_id": config.get("bos_token_id", family.defaults.get("bos_token_id")),
        "eos_id": eos_ids[0] if eos_ids else None,
        "pad_id": config.get("pad_token_id", family.defaults.get("pad_token_id")),
        "other_eos_ids": tuple(eos_ids[1:]),
    }


def _labels(head: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    if head not in ("classification", "token-classification"):
        return ()
    named = config.get("id2label") or {number: f"LABEL_{number}" for number in range(config.get("num_labels") or 2)}
    return tuple(str(named[key]) for key in sorted(named, key=int))


def _read_pattern(family: Family, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`window` and `pattern` of a family that has sliding windows, from what older and newer files say."""
    if not family.windows:
        return {}
    kinds = config.get("layer_types")
    pattern = "".join(_PATTERN_LETTERS.get(kind, "?") for kind in kinds) if kinds else family.pattern(config, layers)
    if "?" in pattern:
        raise InputError(
            f"config.json sets `layer_types` to {sorted(set(kinds or ()))}, llmctl has full and sliding attention"
        )
    window = config.get("sliding_window", family.defaults.get("sliding_window"))
    if "S" not in pattern or window is None:
        return {"pattern": pattern.replace("S", "L")}
    return {"window": window, "pattern": pattern}


def _write_pattern(family: Family, config: ModelConfig) -> dict[str, Any]:
    if not family.windows:
        return {}
    values: dict[str, Any] = {"sliding_window": config.window or None}
    if family.layer_types:
        values["layer_types"] = [_PATTERN_NAMES[config.layer_kind(layer)] for layer in range(config.layers)]
    return values


def _refuse_unsupported(arch: str, config: Mapping[str, Any]) -> None:
    for key, allowed in {**FAMILIES[arch].refused, "quantization_config": (None,)}.items():
        if key in config and config[key] not in allowed:
            raise InputError(
                f"config.json sets `{key}` to {config[key]!r}, which llmctl's {arch} does not compute",
                hint=f"supported: {allowed[-1]!r}",
            )
    kinds = set(config.get("layer_types") or ())
    if not FAMILIES[arch].windows and kinds - {"full_attention"}:
        raise InputError(f"config.json sets `layer_types` to {sorted(kinds)}, llmctl's {arch} has full attention only")
