"""Activations that are computed again for the gradient instead of being kept (1604.06174, 2205.05198)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llmctl.nn import products
from llmctl.nn.foreign import ForeignModel
from llmctl.nn.transformer import Block

aten = torch.ops.aten
PRODUCTS = frozenset((aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, *products.OPERATORS))
"""What would cost most of the time to compute again."""
KERNELS = frozenset(
    (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    )
)

Wrapper = Callable[..., Tensor]
"""Calls `(function, *arguments)`, keeping fewer of its activations."""


def wrapper(mode: str, dropout: float) -> Wrapper | None:
    """What `Block.recompute` is to be: None for `none`, for `full` a whole block again, for `selective` what is cheap.

    Dropout draws the same numbers again. A fused attention with dropout is not kept: left out of the second pass, it
    would shift all draws behind it.
    """
    if mode == "none":
        return None
    further: dict[str, Any] = {}
    if mode == "selective":
        kept = PRODUCTS if dropout else PRODUCTS | KERNELS
        further["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    return partial(checkpoint, use_reentrant=False, **further)


def _policy(kept: frozenset[Any], context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def recomputed(model: nn.Module, mode: str, dropout: float) -> Iterator[None]:
    """The model's blocks keep what `mode` says inside; UsageError if a foreign model cannot do that."""
    if isinstance(model, ForeignModel):
        model.recompute(mode)
        try:
            yield
        finally:
            model.recompute("none")
        return
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.recompute = wrapper(mode, dropout)
    try:
        yield
    finally:
        for block in blocks:
            block.recompute = None
