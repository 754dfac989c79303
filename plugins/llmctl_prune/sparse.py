"""Single weights set to 0, block by block: each block is measured behind those that are pruned already.

Within a block all inputs come from one pass in which its own matrices are still dense, as the authors of SparseGPT and
Wanda do. Embedding, output head, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Block, Transformer
from llmctl.stage import Context
from llmctl.train.batches import Batch
from llmctl_prune.importance import Stream, streams
from llmctl_prune.masks import count_removed, magnitude_mask, wanda_mask
from llmctl_prune.params import GROUPS, PruneParams
from llmctl_prune.sparsegpt import sparsegpt

KEPT = ("value_gate",)
"""A gate over a few heads with a dozen columns (nanochat): no matrix worth its zeros."""


def matrices(block: Block) -> dict[str, nn.Linear]:
    """The linear layers of a block that are pruned, by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in KEPT
    }


class Inputs:
    """What one matrix reads of the calibration data: the sum of squares of each channel, or X^T X, in float64."""

    def __init__(self, linear: nn.Linear, products: bool) -> None:
        shape = (linear.in_features,) * (2 if products else 1)
        self.products = products
        self.total = torch.zeros(shape, dtype=torch.float64, device=linear.weight.device)

    def add(self, rows: Tensor) -> None:
        """Take in `rows (N, in)`."""
        rows = rows.double()
        self.total += rows.T @ rows if self.products else rows.square().sum(dim=0)


def observe(block: Block, flow: Sequence[Stream], products: bool) -> dict[str, Inputs]:
    """The inputs of every matrix of `block` where `flow` enters it; padding does not count."""
    found = {name: Inputs(linear, products) for name, linear in matrices(block).items()}

    def look(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        # Transformer-XL's distances are read without a batch: (T, C).
        found[name].add(stream.picked(args[0]) if args[0].ndim == 3 else args[0])

    hooks = [linear.register_forward_pre_hook(partial(look, name)) for name, linear in matrices(block).items()]
    try:
        for stream in flow:
            block(stream.x, stream.context)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def sparsify(ctx: Context, params: PruneParams, model: Transformer, batches: Sequence[Batch]) -> None:
    """Prune the matrices of every block in place; without gradients."""
    flow = [] if params.method == "magnitude" else streams(model, batches)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        inputs = observe(block, flow, products=params.method == "sparsegpt")
        for name, linear in matrices(block).items():
            linear.weight.copy_(pruned(linear.weight, inputs[name].total, params))
        for stream in flow:  # the next block is measured on what the pruned ones compute
            stream.x = block(stream.x, stream.context)
        ctx.progress(number + 1, len(model.blocks))


def pruned(weight: Tensor, inputs: Tensor, params: PruneParams) -> Tensor:
    """`weight` as the method of `params` leaves it; `inputs` as in `Inputs.total`."""
    if params.method == "sparsegpt":
        given = {"damping": params.damping, "column_block": params.column_block}
        return sparsegpt(weight, inputs, params.sparsity, params.pattern, **given)[0]  # type: ignore[arg-type]  # a mix
    if params.method == "wanda":
        return weight.masked_fill(wanda_mask(weight, inputs.sqrt(), params.sparsity, params.pattern), 0)
    return weight.masked_fill(magnitude_mask(weight, params.sparsity, params.pattern), 0)


def check_pattern(config: ModelConfig, params: PruneParams) -> None:
    """UsageError if a matrix of the blocks cannot have this pattern or has too few columns for this sparsity."""
    with torch.device("meta"):
        block = Transformer(config).blocks[0]
    assert isinstance(block, Block)
    for name, linear in matrices(block).items():
        columns = linear.in_features
        if params.pattern != "unstructured" and columns % GROUPS[params.pattern][1]:
            raise UsageError(
                f"pattern {params.pattern} does not fit {name}, whose rows have {columns} weights",
                hint="pattern: unstructured fits any model",
            )
        if count_removed(columns, params.sparsity) == 0:
            raise UsageError(
                f"sparsity {params.sparsity:g} of the {columns} weights in a row of {name} is less than one",
                hint=f"at least {1 / columns:.3g}",
            )


def zeros(model: Transformer) -> dict[str, float]:
    """How many weights are 0, as shares of the pruned matrices and of the whole model; counted, not computed."""
    weights = [linear.weight for block in model.blocks for linear in matrices(block).values()]  # type: ignore[arg-type]
    gone, size = (sum(int(f(weight)) for weight in weights) for f in (_zeros_of, torch.numel))
    everything = list(model.parameters())
    whole = sum(_zeros_of(parameter) for parameter in everything)
    return {
        "zeros": gone,
        "sparsity": gone / size,
        "sparsity.model": whole / sum(parameter.numel() for parameter in everything),
    }


def _zeros_of(weight: Tensor) -> int:
    return weight.numel() - int(weight.count_nonzero())
