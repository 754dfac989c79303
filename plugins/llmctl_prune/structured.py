"""Structured pruning: layers first, then heads and MLP channels block by block, each measured on what the cut model
computes.

A head goes with its whole group of grouped-query attention, the key/value head and all query heads that read it. So the
same cut fits every family, plain multi-head attention included, keys, values and their cache shrink too, and what stays
is grouped as before. Taking a query head from each group instead would leave the cache as large as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.families import in_transformers
from llmctl.nn.transformer import Block, Transformer
from llmctl.stage import Context
from llmctl.train.batches import Batch
from llmctl_prune.importance import (
    Stream,
    block_influence,
    channel_activation,
    channel_magnitude,
    group_activation,
    group_magnitude,
    layer_magnitude,
    streams,
)
from llmctl_prune.params import PruneParams
from llmctl_prune.surgery import best, fewer_groups, groups_kept, keep_channels, keep_groups, remove_layer, width_kept

DIVIDING = ("llama", "gemma2", "gemma3")
"""Families whose heads must divide the width in transformers 5, though head_dim makes that needless; 4.57 asks none."""


def check_cut(config: ModelConfig, params: PruneParams) -> None:
    """UsageError if so much cannot be removed, or transformers could not load what is left; before any work."""
    if params.layers_removed >= config.layers:
        raise UsageError(
            f"layers_removed {params.layers_removed} leaves nothing of the model's {config.layers} layers",
            hint=f"at most {config.layers - 1}",
        )
    if not params.heads_removed:
        return
    other = "remove MLP channels (mlp_width_removed) or layers (layers_removed) instead"
    if config.traits.positions in ("alibi", "t5"):
        raise UsageError(f"heads_removed: the heads of {config.arch} have biases that all layers share", hint=other)
    if config.kv_heads == 1:
        raise UsageError("heads_removed: all heads of the model read one key/value head, which must stay", hint=other)
    groups = groups_kept(config.kv_heads, params.heads_removed)
    if groups == config.kv_heads:
        raise UsageError(
            f"heads_removed {params.heads_removed:g} of {config.kv_heads} key/value heads is less than one",
            hint=f"at least {1 / config.kv_heads:.3g}",
        )
    if in_transformers(config) and not in_transformers(fewer_groups(config, groups)):
        raise UsageError(
            f"heads_removed: the config.json of {config.arch} has no head_dim, so that transformers could not load it "
            "with fewer heads",
            hint=other,
        )


def prune(ctx: Context, params: PruneParams, model: Transformer, batches: list[Batch]) -> None:
    """Cut `model` in place."""
    random = torch.Generator().manual_seed(params.seed)
    config = model.config
    width = width_kept(config.ff_dim, params.mlp_width_removed)
    groups = groups_kept(config.kv_heads, params.heads_removed)
    narrower = width < config.ff_dim or groups < config.kv_heads
    total = params.layers_removed + (config.layers - params.layers_removed if narrower else 0)
    for step in range(params.layers_removed):
        # Measured afresh after every cut: neighbours that do the same work are both dispensable only while both stay.
        influence = _layer_scores(params, model, batches, random)
        least = min(range(len(influence)), key=influence.__getitem__)
        ctx.log(f"layer {least} of {model.config.layers} removed, importance {influence[least]:.4g}")
        remove_layer(model, least)
        ctx.progress(step + 1, total)
    if width == config.ff_dim and params.mlp_width_removed:
        ctx.warn(f"mlp_width_removed {params.mlp_width_removed} of {width} channels is under 8 and removes nothing")
    if not narrower:
        return
    flow = streams(model, batches)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if groups < config.kv_heads:
            keep_groups(block.attention, best(_group_scores(params, config, block, flow, random), groups))
        if width < config.ff_dim:
            keep_channels(block.ffn, best(_channel_scores(params, config, block, flow, random), width))
        for stream in flow:  # the next block is measured on what the pruned ones compute
            stream.x = block(stream.x, stream.context)
        ctx.progress(params.layers_removed + number + 1, total)
    if groups < config.kv_heads:
        model.config = fewer_groups(model.config, groups)
        _warn_of_transformers_5(ctx, model.config)
    model.config = replace(model.config, ff_dim=width)


def _warn_of_transformers_5(ctx: Context, config: ModelConfig) -> None:
    if config.arch in DIVIDING and in_transformers(config) and config.dim % config.heads:
        ctx.warn(
            f"transformers 4.57 loads this model; 5 wants a {config.arch} whose heads, now {config.heads}, divide its "
            f"width {config.dim}"
        )


def _layer_scores(
    params: PruneParams, model: Transformer, batches: Sequence[Batch], random: torch.Generator
) -> list[float]:
    if params.importance == "activation":
        return block_influence(model, batches)
    if params.importance == "magnitude":
        return layer_magnitude(model)
    return [float(score) for score in torch.rand(len(model.blocks), generator=random)]


def _group_scores(
    params: PruneParams, config: ModelConfig, block: Block, flow: list[Stream], random: torch.Generator
) -> Tensor:
    if params.importance == "activation":
        return group_activation(block, flow)
    if params.importance == "magnitude":
        return group_magnitude(block)
    return torch.rand(config.kv_heads, generator=random)


def _channel_scores(
    params: PruneParams, config: ModelConfig, block: Block, flow: list[Stream], random: torch.Generator
) -> Tensor:
    if params.importance == "activation":
        return channel_activation(block, flow)
    if params.importance == "magnitude":
        return channel_magnitude(block.ffn)
    return torch.rand(config.ff_dim, generator=random)
