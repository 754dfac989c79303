"""Sequences cut across ranks: each computes its tokens, and attends to the keys and values of all that come before.

Keys and values are gathered from all ranks in every layer (as Llama 3's training does, 2407.21783, section 3.3.2), and
their gradients are added up on the way back. torch's own `context_parallel` passes them around a ring, but it has no
rule for the attention kernel of the CPU, and none for masks: packed documents, sliding windows and biases need them.

A sequence is cut into twice as many pieces as there are ranks, of which each gets one from the front and its mirror
image from the back: with causal attention late tokens cost more than early ones.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmctl.errors import UsageError
from llmctl.nn.attention import BACKENDS, AttentionContext, KVCache, Memory, Sdpa, Slots, angles_of
from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.objectives import CausalLM, Objective
from llmctl.train.padding import FILLING, padded

NAME = "context-parallel"
"""The attention backend of a model whose sequences are cut."""
HINT = "set parallel.cp to 1"


def require_cut(model: nn.Module, objective: Objective) -> None:
    """UsageError where cutting sequences would give something else than the whole."""
    if not isinstance(model, Transformer):
        raise UsageError("sequences of a model of another library cannot be cut across ranks", hint=HINT)
    if model.config.traits.kind != "decoder":
        raise UsageError(f"sequences of a model of the kind {model.config.traits.kind} cannot be cut", hint=HINT)
    if model.config.rope_scaling is not None and model.config.rope_scaling.kind == "dynamic":
        raise UsageError("rotary positions with dynamic scaling depend on the whole sequence", hint=HINT)
    if model.config.traits.smear:
        raise UsageError("embeddings that look at the token before (smear) need whole sequences", hint=HINT)
    if not isinstance(objective, CausalLM):
        raise UsageError(f"{type(objective).__name__} needs whole sequences", hint=HINT)


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    """What one of `ranks` computes of `batch`: two pieces of every row, and the targets predicted there.

    Rows are padded to a multiple of 2 `ranks` first. `positions` are always there, and those of the whole rows.
    """
    rows, width = batch.tokens.shape
    if batch.positions is None:
        batch = replace(batch, positions=torch.arange(width).expand(rows, -1))
    width = -(-width // (2 * ranks)) * 2 * ranks
    batch = padded(batch, rows, width)
    columns = places(width, rank, ranks)
    found: dict[str, Any] = {}
    for name in FILLING:
        value = getattr(batch, name)
        if value is not None:
            found[name] = value[:, columns].contiguous()
    where = torch.full((width,), -1)
    where[columns] = torch.arange(len(columns))
    row, column = torch.div(batch.picks, width, rounding_mode="floor"), where[batch.picks % width]
    mine = column >= 0
    found["picks"] = (row * len(columns) + column)[mine]
    found["targets"] = batch.targets[mine]
    if batch.owners is not None:
        found["owners"] = batch.owners[mine]
    size = batch.size * (rank + 1) // ranks - batch.size * rank // ranks
    return replace(batch, **found, size=size)


def places(width: int, rank: int, ranks: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of `width` columns are those of `rank`, `(width / ranks,)` int64: its two pieces one after the other."""
    piece = width // (2 * ranks)
    starts = (rank * piece, (2 * ranks - 1 - rank) * piece)
    return torch.cat([torch.arange(start, start + piece, device=device) for start in starts])


def cut_sequences(model: Transformer, group: dist.ProcessGroup) -> None:
    """From now on `model` in training takes what `share` returns; in evaluation it takes whole sequences, as ever."""
    whole = model.attention_context

    def context(
        self: Transformer,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        cache: KVCache | None,
        *,
        memory: Memory | None = None,
        prefix: Tensor | None = None,
    ) -> AttentionContext:
        if self.training:
            return _context(self, group, tokens, positions, documents, prefix)
        return whole(tokens, positions, documents, cache, memory=memory, prefix=prefix)

    model.attention_context = types.MethodType(context, model)  # type: ignore[method-assign]  # of this one model


@dataclass
class Piece(AttentionContext):
    """Queries of one run of consecutive tokens, `slots`, over the first `keys` keys."""

    keys: int = 0

    def key_count(self, length: int) -> int:
        """See `AttentionContext`."""
        return self.keys


@dataclass
class CutContext(AttentionContext):
    """What the layers of one forward share on one rank; `where_all (1, T)` are the columns of its tokens."""

    group: dist.ProcessGroup | None = None
    where_all: Tensor = field(default_factory=lambda: torch.empty(0))
    width: int = 0
    """Tokens of the whole sequence."""
    pieces: list[Piece] = field(default_factory=list)

    def key_count(self, length: int) -> int:
        """See `AttentionContext`."""
        return self.width

    def where(self, length: int, device: torch.device) -> Tensor:
        """See `AttentionContext`."""
        return self.where_all


class CutAttention(Sdpa):
    """See `llmctl.nn.attention.Backend`: each piece over the keys and values of all ranks up to its end."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """See `Backend`."""
        assert isinstance(context, CutContext)
        assert context.group is not None
        q, k = context.rotated(q, k, layer)
        keys, values = whole_rows(torch.stack((k, v)), 2, context.group).transpose(2, 3)  # (B, KV, S, d) each
        window, length = context.config.layer_window(layer), q.shape[1] // 2
        parts = []
        for number, piece in enumerate(context.pieces):
            own, end = slice(number * length, (number + 1) * length), piece.keys
            part = None if bias is None else bias[:, :, own, :end]
            parts.append(self.over(q[:, own], keys[:, :, :end], values[:, :, :end], window, piece, part))
        return torch.cat(parts, dim=1)


BACKENDS[NAME] = CutAttention()


def _context(
    model: Transformer,
    group: dist.ProcessGroup,
    tokens: Tensor,
    positions: Tensor | None,
    documents: Tensor | None,
    prefix: Tensor | None,
) -> CutContext:
    """The CutContext of a rank's `tokens (B, T)`; all ranks of the group make theirs at once."""
    config, rank, ranks = model.config, group.rank(), group.size()
    width = tokens.shape[1] * ranks
    if width > config.context + 2 * ranks - 1:
        raise UsageError(
            f"{width} tokens do not fit the model's context of {config.context}",
            hint="shorten the sequence or use a model with a longer context",
        )
    assert positions is not None  # `share` gives them
    dropout = config.dropout if model.training else 0.0
    where, piece = places(width, rank, ranks, tokens.device), tokens.shape[1] // 2
    every = None if documents is None else whole_rows(documents, 1, group)
    seen = None if prefix is None else whole_rows(prefix.long(), 1, group).bool()
    pieces = []
    for number, start in enumerate((rank * piece, (2 * ranks - 1 - rank) * piece)):
        keys = start + piece if prefix is None else width  # a prefix is seen by what comes before its end, too
        own = slice(number * piece, (number + 1) * piece)
        pieces.append(
            Piece(
                config,
                documents=None if every is None else every[:, :keys],
                own_documents=None if documents is None else documents[:, own],
                prefix=seen,
                slots=Slots(start, start + piece),
                dropout=dropout,
                keys=keys,
            )
        )
    context = CutContext(
        config,
        NAME,
        documents=documents,
        prefix=prefix,
        dropout=dropout,
        group=group,
        where_all=where[None],
        width=width,
        pieces=pieces,
    )
    context.rotary = angles_of(config, positions, width)
    context.bias = model.bias(context.where_all, width)
    return context


def whole_rows(x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all ranks along `axis` in their order, of `x` that has those of this one; with gradients."""
    gathered: Tensor = _Gathered.apply(x.movedim(axis, 0), group)  # type: ignore[no-untyped-call]  # torch
    halves = gathered.reshape(group.size(), 2, -1, *gathered.shape[1:])
    front, back = halves[:, 0].flatten(0, 1), halves[:, 1].flip(0).flatten(0, 1)
    return torch.cat((front, back)).movedim(0, axis)


class _Gathered(torch.autograd.Function):
    """What every rank has, along the first axis; the gradient of a rank's part is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        found = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
        dist.all_gather_single(found, x.contiguous(), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        found = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_single(found, grad, group=ctx.group)
        return found, None
