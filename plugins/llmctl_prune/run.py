"""Open the model, prune it by the method that was chosen, measure the loss before and after, report what is gone."""

from __future__ import annotations

import torch

from llmctl.errors import InputError
from llmctl.nn.config import ModelConfig
from llmctl.nn.hf import load_config, load_model, save_model
from llmctl.nn.opening import why_foreign
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.train.batches import Batch
from llmctl.train.device import Compute
from llmctl.train.generate import pick_device
from llmctl.train.models import check_decoder
from llmctl.train.objectives import CausalLM
from llmctl.train.validation import mean_loss
from llmctl_prune import calibration as documents
from llmctl_prune.params import PruneParams
from llmctl_prune.sparse import check_pattern, sparsify, zeros
from llmctl_prune.structured import check_cut, prune


def run(ctx: Context, params: PruneParams, model: Artifact, calibration: Artifact) -> None:
    """Prune `model` by what matters on `calibration`; the loss is measured on its validation split."""
    compute = Compute(pick_device(params.device), threads=params.threads)
    if why := why_foreign(model.path):
        raise InputError(
            f"prune cuts llmctl's own transformer, and it does not compute this model: {why}",
            hint="distill it into a smaller model instead",
        )
    structured = params.method == "structured"
    (check_cut if structured else check_pattern)(load_config(model.path), params)
    network = load_model(model.path, compute.device).eval()
    check_decoder(network, "the losses that prune measures")
    before = network.config
    with compute.limit_threads(), torch.no_grad():
        measured, held_out = _batches(ctx, params, network, model, calibration, compute)
        loss_before = mean_loss(network, CausalLM(), held_out, compute)["loss.validation"]
        (prune if structured else sparsify)(ctx, params, network, measured)
        loss_after = mean_loss(network, CausalLM(), held_out, compute)["loss.validation"]
    directory = ctx.output("model")
    save_model(network, directory, model.path)
    sparse = {} if structured else zeros(network)
    if sparse:
        ctx.log(
            f"{sparse['sparsity']:.2%} of the blocks' matrices are 0, {sparse['sparsity.model']:.2%} of the model; "
            "zeros are stored and computed like other weights: the files are as large and as fast as before"
        )
    after = network.config
    ctx.describe("model", parameters=after.parameters(), layers=after.layers, ff_dim=after.ff_dim, **sparse)
    ctx.report(
        {
            **_sizes(before, after),
            **sparse,
            "loss.before": loss_before,
            "loss.after": loss_after,
            "bytes": sum(file.stat().st_size for file in directory.glob("model*.safetensors")),
        }
    )


def _sizes(before: ModelConfig, after: ModelConfig) -> dict[str, float]:
    return {
        "parameters": after.parameters(),
        "parameters.before": before.parameters(),
        "parameters.removed": 1 - after.parameters() / before.parameters(),
        "layers": after.layers,
        "heads": after.heads,
        "kv_heads": after.kv_heads,
        "ff_dim": after.ff_dim,
    }


def _batches(
    ctx: Context, params: PruneParams, model: Transformer, source: Artifact, data: Artifact, compute: Compute
) -> tuple[list[Batch], list[Batch]]:
    """Batches to measure importance on, none where weights alone decide, and batches to measure the loss on."""
    found = documents.splits(data)
    held_out = "validation" if "validation" in found else "train"
    if held_out == "train":
        ctx.warn(f"{data.path} has no validation split: the loss is measured on training documents")
    shape = {"context": model.config.context, "vocab_size": model.config.vocab_size}
    measured = []
    if params.method != "magnitude":
        measured = documents.batches(
            data, "train", source.path, tokens=params.calibration_tokens, seed=params.seed, every_token=True, **shape
        )
    evaluated = documents.batches(
        data, held_out, source.path, tokens=params.evaluation_tokens, seed=0, every_token=False, **shape
    )
    return [batch.to(compute.device) for batch in measured], [batch.to(compute.device) for batch in evaluated]
