"""torch.compile block by block: blocks that compute alike are compiled once, however many there are.

What follows the blocks, from the last states to the sum of the losses, is one more piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from llmctl.nn.foreign import ForeignModel
from llmctl.nn.transformer import Block, Transformer
from llmctl.train.cross_entropy import head_loss


@contextmanager
def compiled_blocks(model: nn.Module, wanted: bool, backend: str = "inductor") -> Iterator[None]:
    """With `wanted`, the model's blocks are compiled inside; a foreign model as a whole.

    A layer's number is a constant to the compiler, and each would be compiled anew. In training it only tells the kind
    of its attention and its window, so layers alike in these carry the number of the first of them meanwhile.
    """
    whole = [model] if wanted and isinstance(model, ForeignModel) else []
    for foreign in whole:
        foreign.hidden = torch.compile(foreign.hidden, backend=backend)  # type: ignore[method-assign]  # undone below
    blocks = [module for module in model.modules() if isinstance(module, Block)] if wanted else []
    numbers = [block.attention.layer for block in blocks]
    first: dict[tuple[str, int], int] = {}
    for block in blocks:
        config, layer = block.attention.config, block.attention.layer
        block.attention.layer = first.setdefault((config.layer_kind(layer), config.layer_window(layer)), layer)
        block.compute = torch.compile(block.compute, backend=backend)  # type: ignore[method-assign]  # undone below
    heads = [module for module in model.modules() if isinstance(module, Transformer)] if wanted and not whole else []
    for head in heads:
        head.loss = torch.compile(partial(head_loss, head), backend=backend)
    try:
        with warnings.catch_warnings():
            # The compiler looks at a gradient that a block's input does not have.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        for block, number in zip(blocks, numbers, strict=True):
            block.attention.layer = number
            del block.compute
        for head in heads:
            head.loss = None
        for foreign in whole:
            del foreign.hidden
