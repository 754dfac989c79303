"""The attention backend `flex`: torch's FlexAttention (2412.05496), which skips blocks that a mask hides.

For packed documents and sliding windows on a GPU, compiled there; on a CPU it runs uncompiled and holds all scores, so
it is slow and serves as a check of the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llmctl.errors import UsageError
from llmctl.nn.attention import BACKENDS, PADDING, AttentionContext, gather

Index = Tensor


class Flex:
    """See `llmctl.nn.attention.Backend`. Without dropout, which FlexAttention does not have."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """See `Backend`."""
        q, k = context.rotated(q, k, layer)
        keys, values = gather(k, v, layer, context)
        mask = _block_mask(context, context.config.layer_window(layer), q.shape[1], keys.shape[2], q)
        return _run(q, keys, values, mask, _score(context, bias), context)

    def cross(self, q: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """See `Backend`."""
        memory, own = context.memory, context.documents
        assert memory is not None
        keys, theirs = memory.keys[layer], memory.documents

        def seen(b: Index, h: Index, i: Index, j: Index) -> Tensor:
            if theirs is None:
                return j >= 0
            if own is None:
                return theirs[b, j] != PADDING
            return (theirs[b, j] == own[b, i]) & (own[b, i] != PADDING)

        mask = create_block_mask(seen, q.shape[0], None, q.shape[1], keys.shape[2], device=q.device)
        return _run(q, keys, memory.values[layer], mask, _score(context, None), context)


BACKENDS["flex"] = Flex()


def _block_mask(context: AttentionContext, window: int, length: int, total: int, q: Tensor) -> BlockMask:
    """The visible blocks; made once per window and forward."""
    made: dict[int, BlockMask] = context.__dict__.setdefault("flex_masks", {})
    if window not in made:
        where, documents, prefix = context.where(length, q.device), context.documents, context.prefix
        rows = where.shape[0] > 1 or documents is not None or prefix is not None
        where = where.expand(q.shape[0], -1)

        def seen(b: Index, h: Index, i: Index, j: Index) -> Tensor:
            behind = where[b, i] - j
            ok = behind >= 0 if context.causal else j >= 0
            if prefix is not None:
                ok = ok | prefix[b, j]
            if window:
                ok = ok & (behind.abs() < window)
            if documents is not None:
                ok = ok & (documents[b, i] == documents[b, j])
            return ok

        made[window] = create_block_mask(seen, q.shape[0] if rows else None, None, length, total, device=q.device)
    return made[window]


def _score(context: AttentionContext, bias: Tensor | None) -> Callable[..., Tensor] | None:
    cap = context.config.attention_softcap
    if not cap and bias is None:
        return None

    def change(score: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
        if cap:
            score = cap * torch.tanh(score / cap)
        return score if bias is None else score + bias[b if bias.shape[0] > 1 else 0, h, i, j]

    return change


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _run(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: BlockMask,
    score: Callable[..., Tensor] | None,
    context: AttentionContext,
) -> Tensor:
    if context.dropout:
        raise UsageError("the attention backend `flex` has no dropout", hint="set dropout to 0 or use sdpa")
    run: Any = _compiled() if q.is_cuda else flex_attention
    grouped = q.shape[2] != keys.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # on a CPU that is the point
        out: Tensor = run(
            q.transpose(1, 2),
            keys,
            values,
            score_mod=score,
            block_mask=mask,
            scale=context.config.scale,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2).flatten(2)
