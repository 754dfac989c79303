"""What training and generation ask of the configuration of a model that transformers computes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.nn.config import Traits


@dataclass(frozen=True, kw_only=True)
class ForeignConfig:
    """What training and generation ask of a configuration; see `ModelConfig` for the fields of the same names."""

    arch: str
    """The `model_type` of transformers: `gpt_neox`."""
    vocab_size: int
    context: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tie_embeddings: bool
    count: int
    """Parameters, a tied head counted once."""
    outer: int
    """Those of the token embedding and of a head of its own."""
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    other_eos_ids: tuple[int, ...] = ()
    traits: Traits = Traits()
    """Of these only the kind is known: a decoder. How it computes is transformers' own."""
    head: str = "lm"
    token_types: int = 0

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation."""
        return frozenset(({self.eos_id} if self.eos_id is not None else set()) | set(self.other_eos_ids))

    def parameters(self) -> int:
        """The exact number of trainable parameters."""
        return self.count

    def training_flops(self, length: int) -> int:
        """Operations of one training step per token in sequences of `length`: six per weight that is multiplied (the
        head's, not the embedding's) and attention in full, as `llmctl.nn.counts` does."""
        attention = 2 * self.layers * self.heads * self.head_dim * length
        return 6 * (self.count - self.outer + self.dim * self.vocab_size + attention)


def describe(net: Any, directory: Path) -> ForeignConfig:
    """The facts of a model, by whichever of its names a family gives to each."""
    config, head = net.config, net.get_output_embeddings()
    embedding = net.get_input_embeddings().weight
    own_head = head is not None and head.weight is not embedding
    eos = _ids(config.eos_token_id)
    if (directory / "generation_config.json").is_file():
        eos += [id for id in _ids(read_json(directory / "generation_config.json").get("eos_token_id")) if id not in eos]
    heads = _first(config, ("num_attention_heads", "n_head", "n_heads"), 1)
    dim = _first(config, ("hidden_size", "n_embd", "d_model"), embedding.shape[1])
    return ForeignConfig(
        arch=config.model_type,
        vocab_size=int(head.weight.shape[0] if head is not None else config.vocab_size),
        context=_context(config, directory),
        dim=dim,
        layers=_first(config, ("num_hidden_layers", "n_layer", "n_layers"), 1),
        heads=heads,
        kv_heads=_first(config, ("num_key_value_heads", "num_kv_heads"), heads),
        head_dim=_first(config, ("head_dim",), dim // heads),
        tie_embeddings=not own_head,
        count=sum(parameter.numel() for parameter in net.parameters()),
        outer=embedding.numel() + (head.weight.numel() if own_head else 0),
        bos_id=next(iter(_ids(config.bos_token_id)), None),
        eos_id=eos[0] if eos else None,
        pad_id=config.pad_token_id,
        other_eos_ids=tuple(eos[1:]),
    )


def _context(config: Any, directory: Path) -> int:
    """What the model was made for; for one that sets no limit (BLOOM), what its tokenizer says."""
    found = _first(config, ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"), 0)
    if not found and (directory / "tokenizer_config.json").is_file():
        limit = read_json(directory / "tokenizer_config.json").get("model_max_length")
        found = int(limit) if isinstance(limit, int | float) and 0 < limit < 10**7 else 0
    return found or 2048


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), default)


def _ids(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else [id for id in value or () if isinstance(id, int)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError if it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is no JSON object")
    return values
