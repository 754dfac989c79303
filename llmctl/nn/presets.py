"""Named shapes: a family and the arguments of a model small enough to train on two CPU cores in a minute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig

PRESETS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama", "dim": 192, "layers": 4, "heads": 6, "kv_heads": 2, "context": 256},
    "qwen3": {"arch": "qwen3", "dim": 192, "layers": 4, "heads": 6, "kv_heads": 2, "context": 256},
    "gpt2": {"arch": "gpt2", "dim": 192, "layers": 4, "heads": 6, "context": 256},
    "gpt3": {"arch": "gpt3", "dim": 192, "layers": 4, "heads": 6, "context": 256, "pattern": "LS", "window": 64},
    "bert": {"arch": "bert", "dim": 192, "layers": 4, "heads": 6, "context": 256, "token_types": 2},
    "roberta": {"arch": "roberta", "dim": 192, "layers": 4, "heads": 6, "context": 256, "token_types": 1},
    "spanbert": {"arch": "bert", "dim": 192, "layers": 4, "heads": 6, "context": 256, "token_types": 2},
    "t5": {"arch": "t5", "dim": 192, "layers": 4, "heads": 6, "context": 256},
}


def preset(name: str, *, vocab_size: int, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration called `name`, with every override that is not None put over the preset's own value."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}", hint=f"one of {', '.join(PRESETS)}")
    changes = {key: value for key, value in (overrides or {}).items() if value is not None}
    return ModelConfig(**{**PRESETS[name], "vocab_size": vocab_size, **changes})
