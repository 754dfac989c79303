"""The attention backend `onnx`: ONNX Runtime's GroupQueryAttention, put into the graph while a model is exported.

The operator rotates, appends to the KV cache and attends in one step, and it may be given the same buffer as past and
present. It lives in the domain com.microsoft (docs/ContribOperators.md of ONNX Runtime) and computes nothing in torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.nn.attention import BACKENDS, AttentionContext
from llmctl.nn.config import ModelConfig
from llmctl.nn.positions import rotary_angles


@dataclass
class OnnxContext(AttentionContext):
    """What every GroupQueryAttention of one graph shares, and the cache tensors that they leave."""

    backend: str = "onnx"
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Keys and values per layer, `(B, KV, P, cache_width)`; P: the past's length, or a shared buffer's capacity."""
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Filled by the backend, layer after layer."""
    last: Tensor | None = None
    """Each row's tokens, past and new, less one: `(B,)` int32."""
    total: Tensor | None = None
    """Width of the attention mask, `(1,)` int32."""
    tables: tuple[Tensor, Tensor] | None = None
    """cos and sin of every position, `(context, d / 2)`, for the operator's own rotation."""


def cache_width(config: ModelConfig) -> int:
    """Head width within the operator, which wants a multiple of 8; narrower heads are padded with zeros."""
    return -(-config.head_dim // 8) * 8


def rotates_inside(config: ModelConfig) -> bool:
    """Whether the operator applies the rotary positions itself, which it does for widths that are multiples of 16."""
    return config.traits.positions == "rope" and config.head_dim % 16 == 0


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position of the context, each `(context, d / 2)` float32."""
    cos, sin = rotary_angles(torch.arange(config.context), config)
    return cos.squeeze(1), sin.squeeze(1)


def group_query_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext) -> Tensor:
    """`q (B, T, H, d)` and `k, v (B, T, KV, d)` to `(B, T, H * d)`; the new cache goes to `context.present`."""
    if not isinstance(context, OnnxContext) or context.last is None or context.total is None:
        raise TypeError("the backend `onnx` needs an OnnxContext with lengths")
    heads, kv_heads, width = q.shape[2], k.shape[2], q.shape[3]
    if context.tables is None:
        q, k = context.rotated(q, k, layer)
    padding = context.past[layer][0].shape[3] - width
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    past_key, past_value = context.past[layer]
    inputs = [q.flatten(2), k.flatten(2), v.flatten(2), past_key, past_value, context.last, context.total]
    out, key, value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*inputs, *(context.tables or ())],
        {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "do_rotary": int(context.tables is not None),
            "scale": 1 / math.sqrt(width),
        },
        dtypes=[q.dtype] * 3,
        shapes=[inputs[0].shape, past_key.shape, past_value.shape],
        version=1,
    )
    context.present.append((key, value))
    if padding:
        out = out.reshape(*out.shape[:2], heads, -1)[..., :width].flatten(2)
    return out


class Fused:
    """See `llmctl.nn.attention.Backend`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """See `Backend`."""
        if bias is not None:
            raise TypeError("the backend `onnx` has no biases yet")
        return group_query_attention(q, k, v, layer, context)

    def cross(self, q: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """See `Backend`."""
        raise TypeError("the backend `onnx` has no cross-attention yet")


BACKENDS["onnx"] = Fused()
