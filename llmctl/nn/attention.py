"""Attention through one function with interchangeable backends, and what all layers of one forward share.

A backend receives queries, keys and values *before* the rotary positions, because fused operators (ONNX Runtime's
GroupQueryAttention) rotate, append to the cache and attend in one step.

A query that may see no key at all, such as one over a source that is all padding, gets zeros: that is what torch's
fused kernels give (a plain softmax gives NaN, a large negative number instead of -inf the mean of what is hidden), it
adds nothing to the residual, and no gradient flows. Every backend and every exported graph does the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.positions import rotary_angles, rotate

PADDING = -1
"""Document id of padding: real tokens do not see it."""
Angles = tuple[Tensor, Tensor]
"""cos and sin, each `(1 or B, T, 1, rotary_dim / 2)`."""


class KVCache:
    """Rotated keys and values of every layer in preallocated buffers; slot s of a row holds its position s.

    Rows may differ in length: each token is written at its own position and sees the slots up to it, so what stands
    beyond a row's last token (padding of a shorter prompt) is overwritten before anything can see it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.tokens = torch.zeros(batch, capacity, device=device, dtype=torch.int64) if config.traits.smear else None
        """What stands in each slot, for models whose embeddings look at the token before."""
        self.capacity = capacity
        self.length = 0
        """Slots in use by the longest row; where the next tokens go unless `positions` says otherwise."""

    def update(self, layer: int, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Write `k, v (B, T, KV, d)` and return all that is visible, `(B, KV, slots.end, d)`."""
        keys, values = self.keys[layer], self.values[layer]
        if slots.positions is None:
            keys[:, :, slots.start : slots.end] = k.transpose(1, 2)
            values[:, :, slots.start : slots.end] = v.transpose(1, 2)
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            keys[rows, :, slots.positions] = k  # advanced indices around a slice give (B, T, KV, d)
            values[rows, :, slots.positions] = v
        return keys[:, :, : slots.end], values[:, :, : slots.end]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.tokens = None if self.tokens is None else self.tokens[rows]

    def before(self, tokens: Tensor, slots: Slots) -> Tensor:
        """Write `tokens (B, T)` and return what stands before each of them, -1 before the first slot."""
        assert self.tokens is not None
        rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
        where = slots.positions
        if where is None:
            where = torch.arange(slots.start, slots.end, device=tokens.device).expand(tokens.shape)
        self.tokens = self.tokens.index_put((rows, where), tokens)
        return self.tokens[rows, (where - 1).clamp(min=0)].masked_fill(where == 0, -1)


@dataclass(frozen=True)
class Slots:
    """Where one forward writes into the cache: `start` to `end`, or each token at its own `positions (B, T)`."""

    start: int
    end: int
    positions: Tensor | None = None


@dataclass
class Memory:
    """What an encoder leaves for the decoder: keys and values of every cross-attention, computed once."""

    keys: list[Tensor]
    """Per layer of the decoder, `(B, KV, S, d)`."""
    values: list[Tensor]
    documents: Tensor | None = None
    """`(B, S)`: which document a source token belongs to, PADDING for none; None where every row is one whole one."""

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.documents = None if self.documents is None else self.documents[rows]


@dataclass
class AttentionContext:
    """What every layer of one forward shares, computed once. Backends with more to share subclass it."""

    config: ModelConfig
    backend: str = "sdpa"
    causal: bool = True
    documents: Tensor | None = None
    """`(B, T)`: a token sees its own document only. Not with a cache."""
    own_documents: Tensor | None = None
    """`(B, T)`, those of the queries, where `documents (B, S)` are those of more keys than these."""
    prefix: Tensor | None = None
    """`(B, T)` bool: tokens that all of their document see, what comes later included (prefix LM)."""
    rotary: dict[str, Angles] = field(default_factory=dict)
    """By kind of layer; empty where positions are not rotary."""
    key_rotary: Angles | None = None
    """Angles of the slots of the cache, where its keys are stored as they were before the rotation."""
    bias: Tensor | None = None
    """`(1 or B, H, T, S)`, added to the scaled scores: ALiBi, T5."""
    cache: KVCache | None = None
    slots: Slots | None = None
    memory: Memory | None = None
    tokens: Tensor | None = None
    """`(B, T)`: what is read, for layers whose values have embeddings of their own."""
    start: Tensor | None = None
    """`(B, T, D)`: what entered the first block, for blocks that mix it in again."""
    dropout: float = 0.0
    """Share of attention weights set to zero; only in training."""
    masks: dict[int, Tensor | None] = field(default_factory=dict)
    """By window, filled by `mask`."""

    def key_count(self, length: int) -> int:
        """S: the keys that `length` new tokens may see, their own included."""
        return length if self.slots is None else self.slots.end

    def distances(self, count: int) -> int:
        """How many distances Transformer-XL encodes for `count` keys."""
        return count

    def where(self, length: int, device: torch.device) -> Tensor:
        """The index of each of `length` queries among the keys, `(1 or B, T)` int64."""
        if self.slots is not None and self.slots.positions is not None:
            return self.slots.positions
        start = 0 if self.slots is None else self.slots.start
        return torch.arange(start, start + length, device=device)[None]

    def before(self, tokens: Tensor) -> Tensor:
        """The token before each of `tokens (B, T)` in its document, `(B, T)`; -1 where there is none."""
        if self.cache is not None and self.slots is not None:
            return self.cache.before(tokens, self.slots)
        found = F.pad(tokens[:, :-1], (1, 0), value=-1)
        if self.documents is None:
            return found
        return found.masked_fill(self.documents != F.pad(self.documents[:, :-1], (1, 0), value=PADDING), -1)

    @property
    def square(self) -> bool:
        """Whether the queries are all the keys there are, so that kernels may know the causal mask by themselves."""
        return self.slots is None or (self.slots.start == 0 and self.slots.positions is None)

    def mask(self, window: int, length: int, device: torch.device) -> Tensor | None:
        """Which of all keys each query may see, bool `(1 or B, 1, T, S)`; None where the kernel need not be told.

        It need not where all are visible, or where `causal` says it all (`square`).
        """
        if window not in self.masks:
            keys = self.key_count(length)
            needed = self.documents is not None or self.prefix is not None or (0 < window < keys)
            if self.causal and not self.square:
                last = self.slots is not None and self.slots.positions is None and length == 1
                needed = needed or not last
            self.masks[window] = self.visible(window, slice(0, length), slice(0, keys), device) if needed else None
        return self.masks[window]

    def visible(self, window: int, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """Which of the keys in `keys` each query in `queries` may see, bool `(1 or B, 1, t, s)`."""
        where = self.where(queries.stop, device)[:, queries, None]
        behind = where - torch.arange(keys.start, keys.stop, device=device)
        seen = behind >= 0 if self.causal else torch.ones_like(behind, dtype=torch.bool)
        if self.prefix is not None:
            seen = seen | self.prefix[:, None, keys]
        if window:
            seen = seen & (behind.abs() < window)
        if self.documents is not None:
            own = self.documents if self.own_documents is None else self.own_documents
            seen = seen & (own[:, queries, None] == self.documents[:, None, keys])
        return seen[:, None]

    def rotated(self, q: Tensor, k: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """`q` and `k (B, T, heads, d)` after the rotary positions of `layer`; keys to be rotated later stay."""
        angles = self.rotary.get(self.config.layer_kind(layer))
        if angles is None:
            return q, k
        return rotate(q, *angles), k if self.key_rotary is not None else rotate(k, *angles)


class Backend(Protocol):
    """How attention is computed."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """Self-attention of `q (B, T, H, d)` over `k, v (B, T, KV, d)` and the cache, `(B, T, H * d)`.

        `bias (1 or B, H, T, S)` is added to the scaled scores.
        """

    def cross(self, q: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """Attention of `q (B, T, H, d)` over `context.memory`, `(B, T, H * d)`."""


BACKENDS: dict[str, Backend] = {}
"""Name to implementation, those loaded so far."""
MODULES = {"flex": "llmctl.nn.flex", "onnx": "llmctl.nn.onnx_attention"}
"""Backends that are loaded when they are first asked for."""


def backend(context: AttentionContext) -> Backend:
    """The backend that `context` names."""
    name = context.backend
    if name not in BACKENDS and name in MODULES:
        import_module(MODULES[name])
    if name not in BACKENDS:
        raise UsageError(f"unknown attention backend {name!r}", hint=f"one of {', '.join({**BACKENDS, **MODULES})}")
    return BACKENDS[name]


class Sdpa:
    """The default: torch's `scaled_dot_product_attention`, whose kernels never hold the T x S scores (2205.14135).

    softmax(scale q k' + bias) v with query head h served by key/value head `h // (H / KV)` (1706.03762, 2305.13245).
    A sliding window is computed in pieces of its own width, so its cost grows with T and not with its square
    (2004.05150). Biases and soft-capped scores are held whole.
    """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """See `Backend`."""
        q, k = context.rotated(q, k, layer)
        return self.over(q, *gather(k, v, layer, context), context.config.layer_window(layer), context, bias)

    def over(
        self, q: Tensor, keys: Tensor, values: Tensor, window: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """Rotated `q (B, T, H, d)` over all that is visible, `keys, values (B, KV, S, d)`; `(B, T, H * d)`."""
        regular = context.slots is None or context.slots.positions is None
        if window and regular and keys.shape[2] > window and context.prefix is None:
            out = self._windowed(q.transpose(1, 2), keys, values, window, context, bias)
        else:
            mask = context.mask(window, q.shape[1], q.device)
            causal = context.causal and mask is None and context.square
            out = scored(q.transpose(1, 2), keys, values, mask, bias, causal, context)
        return out.transpose(1, 2).flatten(2)  # (B, H, T, d) -> (B, T, H * d)

    def cross(self, q: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """See `Backend`."""
        memory = context.memory
        assert memory is not None
        mask = cross_mask(memory, context.documents)
        out = scored(q.transpose(1, 2), memory.keys[layer], memory.values[layer], mask, None, False, context)
        return out.transpose(1, 2).flatten(2)

    def _windowed(
        self, q: Tensor, keys: Tensor, values: Tensor, window: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """`q (B, H, T, d)` piece by piece, each over the keys within its reach alone."""
        length, total = q.shape[2], keys.shape[2]
        first = total - length
        parts = []
        for start in range(0, length, max(window, 64)):
            stop = min(start + max(window, 64), length)
            low = max(0, first + start - window + 1)
            high = first + stop if context.causal else min(total, first + stop + window - 1)
            reach = slice(low, high)
            mask = context.visible(window, slice(start, stop), reach, q.device)
            part = None if bias is None else bias[:, :, start:stop, reach]
            parts.append(
                scored(q[:, :, start:stop], keys[:, :, reach], values[:, :, reach], mask, part, False, context)
            )
        return torch.cat(parts, dim=2)


BACKENDS["sdpa"] = Sdpa()


def gather(k: Tensor, v: Tensor, layer: int, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """All keys and values that the new `k, v (B, T, KV, d)` join, `(B, KV, S, d)`; they are written to the cache."""
    if context.cache is not None and context.slots is not None:
        keys, values = context.cache.update(layer, k, v, context.slots)
    else:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if context.key_rotary is not None and context.config.layer_kind(layer) in context.rotary:
        keys = rotate(keys.transpose(1, 2), *context.key_rotary).transpose(1, 2)
    return keys, values


def scored(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    context: AttentionContext,
) -> Tensor:
    """`(B, H, T, d)` of `q (B, H, T, d)` over `keys, values (B, KV, S, d)`.

    `causal` is for T = S: it aligns at the top left. `mask` is True where a query may see a key.
    """
    config = context.config
    if config.attention_softcap:
        return _capped(q, keys, values, mask, bias, causal, context)
    if bias is not None:
        if causal:
            mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril()
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        causal = False
    return F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=mask,
        dropout_p=context.dropout,
        is_causal=causal,
        scale=config.scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )


def _capped(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    context: AttentionContext,
) -> Tensor:
    """As `scored` with c tanh(scores / c), which no fused kernel of torch has."""
    config, groups = context.config, q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = q @ keys.transpose(-1, -2) * config.scale
    scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
    if bias is not None:
        scores = scores + bias
    if causal:
        mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return F.dropout(weights, context.dropout) @ values


def cross_mask(memory: Memory, documents: Tensor | None) -> Tensor | None:
    """Which source tokens each query may see, bool `(B, 1, 1 or T, S)`; None: all of them.

    With `documents (B, T)` of the targets, those of its own document; else all that are not padding.
    """
    if memory.documents is None:
        return None
    if documents is None:
        return (memory.documents != PADDING)[:, None, None]
    return (documents[:, None, :, None] == memory.documents[:, None, None]) & (documents != PADDING)[:, None, :, None]


def angles_of(config: ModelConfig, positions: Tensor, length: int) -> dict[str, Angles]:
    """The rotary angles of every kind of layer that has any; `length` is that of the whole sequence."""
    if config.traits.positions != "rope":
        return {}
    return {kind: rotary_angles(positions, config, kind == "S", length) for kind in set(config.pattern) & {"L", "S"}}
