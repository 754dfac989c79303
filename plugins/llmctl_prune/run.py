"""Structured pruning: layers first, then MLP channels block by block, each measured on what the cut model computes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmctl.errors import InputError, UsageError
from llmctl.nn.hf import load_model, save_model
from llmctl.nn.opening import why_foreign
from llmctl.nn.transformer import Block, Transformer
from llmctl.stage import Artifact, Context
from llmctl.train.batches import Batch
from llmctl.train.device import Compute
from llmctl.train.generate import pick_device
from llmctl.train.models import check_decoder
from llmctl.train.objectives import CausalLM
from llmctl.train.validation import mean_loss
from llmctl_prune import calibration as documents
from llmctl_prune.importance import (
    Stream,
    block_influence,
    channel_activation,
    channel_magnitude,
    layer_magnitude,
    streams,
)
from llmctl_prune.params import PruneParams
from llmctl_prune.surgery import best, keep_channels, remove_layer, width_kept


def run(ctx: Context, params: PruneParams, model: Artifact, calibration: Artifact) -> None:
    """Prune `model` by what matters on `calibration`; the loss is measured on its validation split."""
    compute = Compute(pick_device(params.device), threads=params.threads)
    if why := why_foreign(model.path):
        raise InputError(
            f"prune cuts llmctl's own transformer, and it does not compute this model: {why}",
            hint="distill it into a smaller model instead",
        )
    network = load_model(model.path, compute.device).eval()
    check_decoder(network, "the losses that prune measures")
    before = network.config
    if params.layers_removed >= before.layers:
        raise UsageError(
            f"layers_removed {params.layers_removed} leaves nothing of the model's {before.layers} layers",
            hint=f"at most {before.layers - 1}",
        )
    with compute.limit_threads(), torch.no_grad():
        measured, held_out = _batches(ctx, params, network, model, calibration, compute)
        loss_before = mean_loss(network, CausalLM(), held_out, compute)["loss.validation"]
        prune(ctx, params, network, measured)
        loss_after = mean_loss(network, CausalLM(), held_out, compute)["loss.validation"]
    after = network.config
    directory = ctx.output("model")
    save_model(network, directory, model.path)
    ctx.describe("model", parameters=after.parameters(), layers=after.layers, ff_dim=after.ff_dim)
    ctx.report(
        {
            "parameters": after.parameters(),
            "parameters.before": before.parameters(),
            "parameters.removed": 1 - after.parameters() / before.parameters(),
            "layers": after.layers,
            "ff_dim": after.ff_dim,
            "loss.before": loss_before,
            "loss.after": loss_after,
            "bytes": (directory / "model.safetensors").stat().st_size,
        }
    )


def _batches(
    ctx: Context, params: PruneParams, model: Transformer, source: Artifact, data: Artifact, compute: Compute
) -> tuple[list[Batch], list[Batch]]:
    """Batches to measure importance on, and batches to measure the loss on."""
    found = documents.splits(data)
    held_out = "validation" if "validation" in found else "train"
    if held_out == "train":
        ctx.warn(f"{data.path} has no validation split: the loss is measured on training documents")
    shape = {"context": model.config.context, "vocab_size": model.config.vocab_size}
    measured = documents.batches(
        data, "train", source.path, tokens=params.calibration_tokens, seed=params.seed, every_token=True, **shape
    )
    evaluated = documents.batches(
        data, held_out, source.path, tokens=params.evaluation_tokens, seed=0, every_token=False, **shape
    )
    return [batch.to(compute.device) for batch in measured], [batch.to(compute.device) for batch in evaluated]


def _layer_scores(
    params: PruneParams, model: Transformer, batches: list[Batch], random: torch.Generator
) -> list[float]:
    if params.importance == "activation":
        return block_influence(model, batches)
    if params.importance == "magnitude":
        return layer_magnitude(model)
    return [float(score) for score in torch.rand(len(model.blocks), generator=random)]


def _channel_scores(
    params: PruneParams, model: Transformer, block: Block, flow: list[Stream], random: torch.Generator
) -> Tensor:
    if params.importance == "activation":
        return channel_activation(block, flow)
    if params.importance == "magnitude":
        return channel_magnitude(block.ffn)
    return torch.rand(model.config.ff_dim, generator=random)


def prune(ctx: Context, params: PruneParams, model: Transformer, batches: list[Batch]) -> None:
    """Cut `model` in place."""
    random = torch.Generator().manual_seed(params.seed)
    width = width_kept(model.config.ff_dim, params.mlp_width_removed)
    total = params.layers_removed + (model.config.layers - params.layers_removed if width < model.config.ff_dim else 0)
    for step in range(params.layers_removed):
        # Measured afresh after every cut: neighbours that do the same work are both dispensable only while both stay.
        influence = _layer_scores(params, model, batches, random)
        least = min(range(len(influence)), key=influence.__getitem__)
        ctx.log(f"layer {least} of {model.config.layers} removed, importance {influence[least]:.4g}")
        remove_layer(model, least)
        ctx.progress(step + 1, total)
    if width == model.config.ff_dim:
        if params.mlp_width_removed:
            ctx.warn(f"mlp_width_removed {params.mlp_width_removed} of {width} channels is under 8 and removes nothing")
        return
    flow = streams(model, batches)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        scores = _channel_scores(params, model, block, flow, random)
        keep_channels(block.ffn, best(scores, width).to(block.ffn.down.weight.device))
        for stream in flow:  # the next block is measured on what the pruned ones compute
            stream.x = block(stream.x, stream.context)
        ctx.progress(params.layers_removed + number + 1, total)
    model.config = replace(model.config, ff_dim=width)
