"""Cutting layers and MLP channels out of a model, in place; what stays computes what it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmctl.nn.transformer import Block, FeedForward, Transformer


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
    for rows in (ffn.gate, ffn.up):
        if rows is not None:
            _set(rows, rows.weight[kept], None if rows.bias is None else rows.bias[kept])
    _set(ffn.down, ffn.down.weight[:, kept], ffn.down.bias)


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    linear.out_features, linear.in_features = weight.shape


def width_kept(ff_dim: int, removed: float) -> int:
    """Channels to keep when the share `removed` goes: a multiple of 8 at least as large, but no more than there are."""
    wanted = round(ff_dim * (1 - removed), 6)  # 0.7 * 80 is 56.000…01 in floating point
    return min(ff_dim, max(8, math.ceil(wanted / 8) * 8))


def best(scores: Tensor | Sequence[float], count: int) -> Tensor:
    """Indices of the `count` largest scores, rising; among equals the first ones."""
    order = torch.as_tensor(scores).argsort(descending=True, stable=True)
    return order[:count].sort().values
