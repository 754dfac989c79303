"""Attention through one function with interchangeable backends, and what all layers of one forward share.

A backend receives queries, keys and values *before* the rotary positions, because fused operators (ONNX Runtime's
GroupQueryAttention) rotate, append to the cache and attend in one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig


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


@dataclass(frozen=True)
class Slots:
    """Where one forward writes into the cache: `start` to `end`, or each token at its own `positions (B, T)`."""

    start: int
    end: int
    positions: Tensor | None = None


@dataclass
class AttentionContext:
    """What every layer of one forward shares, computed once. Backends with more to share subclass it."""

    backend: str = "sdpa"
    causal: bool = True
    """Token t sees tokens 0 … t of the same forward. Used only where queries and keys are the same tokens."""
    mask: Tensor | None = None
    """Instead of `causal`: True where a query may see a key, `(1 or B, 1, T, S)`."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin, each `(1 or B, T, 1, d / 2)`; None where positions are learned."""
    cache: KVCache | None = None
    slots: Slots | None = None


Backend = Callable[[Tensor, Tensor, Tensor, int, AttentionContext], Tensor]
BACKENDS: dict[str, Backend] = {}
"""Name to implementation; the exporter adds `onnx`."""


def attention(q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext) -> Tensor:
    """Scaled dot-product attention of `q (B, T, H, d)` over `k, v (B, T, KV, d)` and the cache, `(B, T, H * d)`.

    softmax(q k' / sqrt(d)) v with query head h served by key/value head `h // (H / KV)` (arXiv 1706.03762, 2305.13245).
    """
    if context.backend not in BACKENDS:
        raise UsageError(f"unknown attention backend {context.backend!r}", hint=f"one of {', '.join(BACKENDS)}")
    return BACKENDS[context.backend](q, k, v, layer, context)


def sdpa(q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext) -> Tensor:
    """The default backend: torch's `scaled_dot_product_attention`."""
    if context.rotary is not None:
        q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
    if context.cache is not None and context.slots is not None:
        keys, values = context.cache.update(layer, k, v, context.slots)
    else:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys,
        values,
        attn_mask=context.mask,
        is_causal=context.causal and context.mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).flatten(2)  # (B, H, T, d) -> (B, T, H * d)


BACKENDS["sdpa"] = sdpa


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles of `positions (…, T)`, each `(…, T, 1, head_dim / 2)` (RoFormer, 2104.09864).

    In float32 whatever the model's dtype: in bfloat16 positions beyond 256 would collide.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + d/2) of `x (B, T, H, d)` by the angle of their position: Hugging Face's half-split."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def document_mask(documents: Tensor) -> Tensor:
    """Causal within each document of a packed batch: `documents (B, T)` ids -> bool `(B, 1, T, T)`."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, None, :, None] == documents[:, None, None, :]) & causal


def cache_mask(positions: Tensor, slots: int) -> Tensor:
    """A query at position p sees the slots 0 … p: `positions (1 or B, T)` -> bool `(1 or B, 1, T, slots)`."""
    return torch.arange(slots, device=positions.device) <= positions[:, None, :, None]
