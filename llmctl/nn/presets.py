"""Named shapes: of each family one that two CPU cores train in minutes, and the published models in full size.

A model is a preset with a vocabulary: `preset("bert", vocab_size=8192)`, `preset("llama-3.2-1b")`. Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from llmctl.errors import UsageError
from llmctl.nn.config import TRAITS, ModelConfig, Traits
from llmctl.nn.published import PUBLISHED

_TINY = {"dim": 192, "layers": 4, "heads": 6, "context": 256}
_GROUPED = {**_TINY, "kv_heads": 2}
_BERT = {**_TINY, "arch": "bert", "token_types": 2, "norm_eps": 1e-12}
_WINDOW = {"window": 64}

PRESETS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama", **_GROUPED},
    "qwen3": {"arch": "qwen3", **_GROUPED},
    "gpt2": {"arch": "gpt2", **_TINY},
    "bert": _BERT,
    "roberta": {**_TINY, "arch": "roberta", "token_types": 1},
    "spanbert": _BERT,
    # Half of BERT's layers, without its token types: what a student of BERT looks like.
    "distilbert": {**_TINY, "arch": "distilbert", "layers": 2, "norm_eps": 1e-12},
    "gpt1": {**_TINY, "arch": "gpt1"},
    "t5": {**_TINY, "arch": "t5", "norm_eps": 1e-6},
    "t5-v1.1": {**_TINY, "arch": "t5v1_1", "norm_eps": 1e-6, "tie_embeddings": False},
    "gpt3": {**_TINY, "arch": "gpt3", "pattern": "LS", "window": 32},
    "gopher": {**_TINY, "arch": "gopher"},
    # Chinchilla is Gopher with fewer parameters and more tokens.
    "chinchilla": {**_TINY, "arch": "gopher", "layers": 3},
    # As many parameters as the others in fewer, wider layers: what set Jurassic-1 apart from GPT-3.
    "jurassic": {**_TINY, "arch": "gpt2", "layers": 3, "dim": 224, "heads": 7},
    # Attention twice as wide as the model, and a feed-forward layer eight times.
    "lamda": {**_TINY, "arch": "lamda", "norm_eps": 1e-6, "head_dim": 64, "ff_dim": 1536},
    "bloom": {**_TINY, "arch": "bloom"},
    "mistral": {**_GROUPED, **_WINDOW, "arch": "mistral"},
    "qwen2": {**_GROUPED, "arch": "qwen2", "rope_theta": 1e6, "norm_eps": 1e-6},
    "gemma2": {
        **_GROUPED, **_WINDOW, "arch": "gemma2", "pattern": "SL", "norm_eps": 1e-6, "attention_softcap": 50.0,
        "logit_softcap": 30.0,
    },
    "gemma3": {
        **_GROUPED, **_WINDOW, "arch": "gemma3", "pattern": "SSSL", "norm_eps": 1e-6, "rope_theta": 1e6,
        "local_rope_theta": 1e4,
    },
    "phi3": {**_TINY, "arch": "phi3", "tie_embeddings": False},
    "smollm3": {**_GROUPED, "arch": "smollm3", "pattern": "LLLN", "norm_eps": 1e-6},
    # What a text of so many tokens teaches best (docs/pretraining.md): nanochat's model and our recipe.
    "speedrun": {
        **_TINY, "arch": "speedrun", "heads": 3, "rope_theta": 1e5, "qk_gain": 1.2, "logit_softcap": 15.0,
        "value_pattern": "-V", "tie_embeddings": False,
    },
}  # fmt: skip
"""The small ones."""

TRAIT_NAMES = frozenset(field.name for field in fields(Traits))
VOCABULARY = 8192
"""What a small preset is shown with where no tokenizer says otherwise."""


def preset_names() -> list[str]:
    """Every name that `preset` takes, small ones first."""
    return [*PRESETS, *PUBLISHED]


def near_presets(name: str) -> str:
    """A hint for a name that is none: names like it, or where all are listed."""
    near = get_close_matches(name.lower(), preset_names(), n=3, cutoff=0.55)
    return f"did you mean {' or '.join(f'`{other}`' for other in near)}?" if near else "`llmctl models` lists them"


def preset(name: str, *, vocab_size: int | None = None, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration called `name`, with every override that is not None put over the preset's own value.

    Traits among the overrides (`positions`, `qk_norm`, …) replace the family's; `window: 0` makes every layer see all.
    Raises UsageError for an unknown name, or a shape that does not fit together.
    """
    shape = dict(PRESETS[name]) if name in PRESETS else dict(PUBLISHED[name].shape) if name in PUBLISHED else None
    if shape is None:
        raise UsageError(f"unknown preset {name!r}", hint=near_presets(name))
    changes = {key: value for key, value in (overrides or {}).items() if value is not None}
    shape["vocab_size"] = vocab_size or shape.get("vocab_size", VOCABULARY)
    return ModelConfig(**_joined(shape, changes))


def _joined(shape: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `shape`, without what of `shape` they leave without meaning."""
    traits = {name: changes.pop(name) for name in TRAIT_NAMES if name in changes}
    if traits:
        changes["traits"] = replace(TRAITS[shape["arch"]], **traits)
        if traits.get("positions", "rope") != "rope":
            shape = {key: value for key, value in shape.items() if key not in ("rope_scaling", "local_rope_theta")}
    if changes.get("window") == 0 and "pattern" not in changes:
        changes["pattern"] = str(shape.get("pattern", "L")).replace("S", "L")
    if "S" not in changes.get("pattern", "S") and "window" not in changes:
        changes["window"] = 0
    return {**shape, **changes}
