"""How much each layer, each group of heads and each MLP channel matters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmctl.nn.attention import AttentionContext
from llmctl.nn.transformer import Block, FeedForward, Transformer
from llmctl.train.batches import Batch


@dataclass
class Stream:
    """One batch on its way through the blocks: what it is now, `(B, T, D)`, and the positions that count."""

    x: Tensor
    context: AttentionContext
    picks: Tensor

    def picked(self, x: Tensor) -> Tensor:
        """`x (B, T, C)` at the positions that count, `(N, C)`; padding is none of them."""
        return x.flatten(0, 1)[self.picks]


def streams(model: Transformer, batches: Sequence[Batch]) -> list[Stream]:
    """Every batch as it enters the first block."""
    result = []
    for batch in batches:
        context = model.attention_context(batch.tokens, batch.positions, batch.documents, None)
        result.append(Stream(model.enter(batch.tokens, context, batch.positions), context, batch.picks))
    return result


def block_influence(model: Transformer, batches: Sequence[Batch]) -> list[float]:
    """1 - cosine of what enters and what leaves each block, mean over tokens (ShortGPT, arXiv 2403.03853)."""
    flow = streams(model, batches)
    influence = []
    for block in _blocks(model):
        total, count = 0.0, 0
        for stream in flow:
            before, stream.x = stream.x, block(stream.x, stream.context)
            cosine = torch.cosine_similarity(stream.picked(before), stream.picked(stream.x), dim=-1)
            total, count = total + float((1 - cosine).sum()), count + len(cosine)
        influence.append(total / count)
    return influence


def layer_magnitude(model: Transformer) -> list[float]:
    """L2 norm of what each block can write to the residual stream: its attention's and its MLP's output matrix."""
    return [
        float(torch.linalg.vector_norm(torch.cat((block.attention.out.weight, block.ffn.down.weight), dim=1)))
        for block in _blocks(model)
    ]


def channel_activation(block: Block, flow: Sequence[Stream]) -> Tensor:
    """mean |input of down| times the norm of down's column, `(F,)`; `flow` is what enters the block.

    The activation-based importance of Minitron (arXiv 2407.14679), weighted by what the channel can write.
    """
    columns: Tensor = block.ffn.down.weight.norm(dim=0).double()
    total = torch.zeros_like(columns)
    count = 0
    for stream in flow:
        inner = stream.picked(block.ffn.inner(block.ffn_input(block.attended(stream.x, stream.context))))
        total += inner.abs().sum(dim=0).double()
        count += len(inner)
    return total / count * columns


def channel_magnitude(ffn: FeedForward) -> Tensor:
    """Product of the norms of a channel's rows and column, `(F,)`: unchanged when one scale moves to another."""
    score: Tensor = ffn.up.weight.norm(dim=1).double() * ffn.down.weight.norm(dim=0).double()
    if ffn.gate is not None:
        score = score * ffn.gate.weight.norm(dim=1).double()
    return score


def group_activation(block: Block, flow: Sequence[Stream]) -> Tensor:
    """Mean norm of what each key/value head and its query heads write to the residual stream, `(KV,)`.

    Minitron's score of a head (arXiv 2407.14679), the norm of its output, behind the output matrix, without which a
    large output may write nothing. `flow` is what enters the block.
    """
    out, groups = block.attention.out, block.attention.config.kv_heads
    columns = out.weight.reshape(len(out.weight), groups, -1)
    total, count = torch.zeros(groups, dtype=torch.float64, device=out.weight.device), 0

    def look(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal count
        rows = stream.picked(args[0])
        rows = rows.reshape(len(rows), groups, -1)
        for group in range(groups):
            total[group] += (rows[:, group] @ columns[:, group].T).norm(dim=1).double().sum()
        count += len(rows)

    hook = out.register_forward_pre_hook(look)
    try:
        for stream in flow:
            block.attended(stream.x, stream.context)
    finally:
        hook.remove()
    return total / count


def group_magnitude(block: Block) -> Tensor:
    """Norm of a group's rows of the value matrix times that of its columns of the output matrix, `(KV,)`.

    Unchanged when a scale moves from one to the other; queries and keys only say where a head looks.
    """
    attention, groups = block.attention, block.attention.config.kv_heads
    values = attention.v.weight.reshape(groups, -1).norm(dim=1)
    written = attention.out.weight.reshape(len(attention.out.weight), groups, -1).norm(dim=(0, 2))
    score: Tensor = values.double() * written.double()
    return score


def _blocks(model: Transformer) -> Iterator[Block]:
    for block in model.blocks:
        assert isinstance(block, Block)
        yield block
