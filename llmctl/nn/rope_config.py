"""Rotary bases and their scaling in `config.json`: transformers 4 says `rope_theta` and `rope_scaling`, 5 says
`rope_parameters`. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmctl.errors import InputError
from llmctl.nn.config import ModelConfig, RopeScaling


def read_rope(config: Mapping[str, Any], defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields of a ModelConfig; `values` are those read so far. InputError for a scaling that is not ours."""
    theta = config.get("rope_theta", defaults.get("rope_theta", 10_000.0))
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        theta = rope.get("rope_theta", theta)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            found = _read_scaling(key, kind, rope, config, values["context"])
    return {"rope_theta": 10_000.0 if theta is None else float(theta), **found}


def _read_scaling(
    key: str, kind: str, rope: Mapping[str, Any], config: Mapping[str, Any], context: int
) -> dict[str, Any]:
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise InputError(
            f"config.json sets `{key}` to type {kind!r}, which llmctl does not compute",
            hint="supported: linear, dynamic, yarn, llama3, or none",
        )
    factor = float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "dynamic":
        # transformers keeps the trained context in max_position_embeddings and lets sequences be longer.
        return {
            "context": int(context * factor),
            "rope_scaling": RopeScaling(kind="dynamic", factor=factor, original_context=context),
        }
    options: dict[str, Any] = {"original_context": int(original or context)}
    if kind == "yarn":
        options |= {name: rope[name] for name in ("beta_fast", "beta_slow") if rope.get(name)}
        options |= {"truncate": bool(rope.get("truncate", True)), "attention_factor": _attention_factor(rope, factor)}
    if kind == "llama3":
        options |= {name: float(rope[name]) for name in ("low_freq_factor", "high_freq_factor") if name in rope}
    return {"rope_scaling": RopeScaling(kind=kind, factor=factor, **options)}  # type: ignore[arg-type]  # checked above


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """yarn's: given, or the quotient of two (DeepSeek's `mscale` and `mscale_all_dim`), or 0 for the paper's."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        above, below = (0.1 * rope[name] * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
        return float(above / below)
    return 0.0


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and, where there is one, `rope_scaling`; a fixed NTK scaling is a larger base."""
    scaling = config.rope_scaling
    values: dict[str, Any] = {"rope_theta": config.rope_theta}
    if scaling is None:
        return values
    if scaling.kind == "ntk":
        width = config.rotary_dim
        return {"rope_theta": config.rope_theta * scaling.factor ** (width / (width - 2))}
    if scaling.kind == "dynamic":
        written = {"rope_type": "dynamic", "factor": scaling.factor}
        return {**values, "max_position_embeddings": scaling.original_context, "rope_scaling": written}
    written = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        written["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "yarn":
        written |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
        if scaling.attention_factor:
            written["attention_factor"] = scaling.attention_factor
    if scaling.kind == "llama3":
        written |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    return {**values, "rope_scaling": written}
