"""Cutting layers, heads and MLP channels out of a model, in place; what stays computes what it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Attention, Block, FeedForward, Transformer


def remove_layer(model: Transformer, index: int) -> None:
    """Take out one block; the later ones move up, each keeping what it sees."""
    config = model.config
    kinds = "".join(config.layer_kind(layer) for layer in range(config.layers) if layer != index)
    values = "".join("-V"[config.has_values(layer)] for layer in range(config.layers) if layer != index)
    del model.blocks[index]
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.attention.layer = number  # its place in a KV cache
    window = config.window if "S" in kinds else 0
    model.config = replace(config, layers=len(model.blocks), pattern=kinds, window=window, value_pattern=values)


def keep_channels(ffn: FeedForward, kept: Tensor) -> None:
    """Keep only these of the MLP's inner channels, in their order."""
    kept = kept.to(ffn.down.weight.device)
    for rows in (ffn.gate, ffn.up):
        if rows is not None:
            _set(rows, rows.weight[kept], None if rows.bias is None else rows.bias[kept])
    _set(ffn.down, ffn.down.weight[:, kept], ffn.down.bias)


def keep_groups(attention: Attention, kept: Tensor) -> None:
    """Keep only these key/value heads and the query heads that read them, in their order."""
    config, kept = attention.config, kept.to(attention.out.weight.device)
    heads = members(kept, config.heads // config.kv_heads)
    queries, keys = members(heads, config.head_dim), members(kept, config.head_dim)
    for linear, rows in ((attention.q, queries), (attention.k, keys), (attention.v, keys)):
        _set(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    _set(attention.out, attention.out.weight[:, queries], attention.out.bias)
    if attention.value_embedding is not None and attention.value_gate is not None:
        table = attention.value_embedding
        table.weight, table.embedding_dim = _copy(table.weight[:, keys]), len(keys)
        _set(attention.value_gate, attention.value_gate.weight[kept], None)
    if attention.distance is not None:
        _set(attention.distance, attention.distance.weight[queries], None)
        attention.content_bias = _copy(attention.content_bias[heads])
        attention.distance_bias = _copy(attention.distance_bias[heads])
    attention.config = fewer_groups(config, len(kept))


def fewer_groups(config: ModelConfig, groups: int) -> ModelConfig:
    """The configuration with so many key/value heads, as many query heads to each as before, heads as wide."""
    return replace(config, heads=config.heads // config.kv_heads * groups, kv_heads=groups, head_dim=config.head_dim)


def members(groups: Tensor, size: int) -> Tensor:
    """The numbers of all that lie in these groups of `size` side by side."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = _copy(weight)
    if bias is not None:
        linear.bias = _copy(bias)
    linear.out_features, linear.in_features = weight.shape


def width_kept(ff_dim: int, removed: float) -> int:
    """Channels to keep when the share `removed` goes: a multiple of 8 at least as large, but no more than there are."""
    wanted = round(ff_dim * (1 - removed), 6)  # 0.7 * 80 is 56.000…01 in floating point
    return min(ff_dim, max(8, math.ceil(wanted / 8) * 8))


def groups_kept(kv_heads: int, removed: float) -> int:
    """Key/value heads to keep when the share `removed` goes, rounded up."""
    return max(1, math.ceil(round(kv_heads * (1 - removed), 6)))


def best(scores: Tensor | Sequence[float], count: int) -> Tensor:
    """Indices of the `count` largest scores, rising; among equals the first ones."""
    order = torch.as_tensor(scores).argsort(descending=True, stable=True)
    return order[:count].sort().values
