"""The attention backend `onnx`: ONNX Runtime's fused operators, put into the graph while a model is exported.

Causal attention with a cache is `com.microsoft.GroupQueryAttention`, which rotates, appends to the cache and attends in
one step, and may be given the same buffer as past and present (docs/ContribOperators.md of ONNX Runtime). All other
attention is the standard `Attention` of operator set 23: of ONNX Runtime's operators the one that gives zeros for a
query that may see no key, as torch does (MultiHeadAttention gives the mean of what is hidden, or NaN). Neither computes
anything in torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.nn.attention import BACKENDS, Angles, AttentionContext, angles_of, cross_mask
from llmctl.nn.config import ModelConfig

OPSET = 23
"""The first operator set with `Attention`."""


@dataclass
class CachedContext(AttentionContext):
    """What every GroupQueryAttention of one graph shares, and the cache tensors that they leave.

    `positions`, `width`, `last` and `total` are of tokens that follow a cache; see `llmctl_export_onnx.decoder`.
    """

    backend: str = "onnx"
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Keys and values per layer, `(B, KV, P, cache_width)`; P: the past's length, or a shared buffer's capacity."""
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Filled by the backend, layer after layer."""
    positions: Tensor | None = None
    """Where each token stands, `(B, T)` int64."""
    width: int = 0
    """Width of the attention mask: most tokens, past and new, of any row."""
    last: Tensor | None = None
    """Each row's tokens, past and new, less one: `(B,)` int32."""
    total: Tensor | None = None
    """`width` as `(1,)` int32."""
    remembered: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """The cache tensors of tokens, of models whose embeddings look at the token before: the last of the graph's."""
    tables: dict[str, Angles] = field(default_factory=dict)
    """By kind of layer, for the operator's own rotation: cos and sin of every position, `(context, rotary_dim / 2)`."""

    def key_count(self, length: int) -> int:
        """See `AttentionContext`."""
        return self.width

    def distances(self, count: int) -> int:
        """All of the context: a constant, which ONNX Runtime computes once, when it loads the graph."""
        return self.config.context

    def where(self, length: int, device: torch.device) -> Tensor:
        """See `AttentionContext`."""
        assert self.positions is not None
        return self.positions

    def before(self, tokens: Tensor) -> Tensor:
        """See `AttentionContext`. The tokens are kept as one more layer of the cache, so that whatever runs the graph
        need not know of them: their digits to the base 128, which int8 holds exactly, are values, and each query sees
        the slot before its own."""
        positions = self.where(tokens.shape[1], tokens.device)
        past = self.past[self.config.layers]
        dtype, width = past[0].dtype, past[0].shape[3]
        digits = torch.stack([tokens % 128, tokens // 128 % 128, tokens // 16384], dim=-1).to(dtype)
        values = F.pad(digits, (0, self.config.kv_heads * width - 3))
        behind = positions[..., None] - torch.arange(self.width, device=tokens.device)
        bias = torch.where(behind[:, None] == 1, 0.0, -1e4).to(dtype)
        nothing = torch.zeros_like(values)
        out, key, value = _operator(nothing, nothing, values, past, self, bias, self.config.kv_heads)
        self.remembered.append((key, value))
        found = out[..., :3].round().to(torch.int64)
        return torch.where(positions == 0, -1, found[..., 0] + 128 * found[..., 1] + 16384 * found[..., 2])


def cache_layers(config: ModelConfig) -> int:
    """Layers of the graph's cache: those of the model, and one of tokens where embeddings look at the one before."""
    return config.layers + config.traits.smear


def cache_width(config: ModelConfig) -> int:
    """Head width within the operator, which wants a multiple of 8; narrower heads are padded with zeros."""
    return -(-config.head_dim // 8) * 8


def rotates_inside(config: ModelConfig) -> bool:
    """Whether the operator applies the rotary positions itself: it does so for heads of a multiple of 16 channels, of
    which a multiple of 16 is turned."""
    return config.traits.positions == "rope" and config.head_dim % 16 == 0 and config.rotary_dim % 16 == 0


def rotary_tables(config: ModelConfig) -> dict[str, Angles]:
    """cos and sin of every position of the context by kind of layer, each `(context, rotary_dim / 2)` float32.

    UsageError for dynamic scaling that would change them as a sequence grows: cached keys are rotated already.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and config.context > scaling.original_context:
        raise UsageError(
            "rope_scaling `dynamic` turns cached keys anew as a text grows, which no exported graph can",
            hint="fine-tune and export with `ntk` or `yarn`, or set the context to original_context",
        )
    angles = angles_of(config, torch.arange(config.context), 0)
    return {kind: (cos.squeeze(1), sin.squeeze(1)) for kind, (cos, sin) in angles.items()}


class Onnx:
    """See `llmctl.nn.attention.Backend`; only while tracing."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """See `Backend`. With a `CachedContext` the new cache goes to `context.present`."""
        if isinstance(context, CachedContext):
            return _group_query_attention(q, k, v, layer, context, bias)
        q, k = context.rotated(q, k, layer)
        mask = context.mask(context.config.layer_window(layer), q.shape[1], q.device)
        return _attention(q.flatten(2), k.flatten(2), v.flatten(2), _joined(q, mask, bias), context.config)

    def cross(self, q: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """See `Backend`."""
        memory = context.memory
        assert memory is not None
        keys, values = memory.keys[layer], memory.values[layer]
        mask = cross_mask(memory, context.documents)
        if mask is not None:  # the CPU's kernel wants it for each query
            mask = mask.expand(-1, -1, q.shape[1], -1)
        out = _attention(q.transpose(1, 2), keys, values, mask, context.config)
        return out.transpose(1, 2).flatten(2)


BACKENDS["onnx"] = Onnx()


def _joined(q: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One tensor for what may be seen and what is added to the scores."""
    if bias is None or mask is None:
        return mask if bias is None else bias.to(q.dtype)
    return bias.to(q.dtype).masked_fill(~mask, -torch.inf)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: ModelConfig) -> Tensor:
    """The standard operator: `(B, T, H * d)` and `(B, S, KV * d)`, or `(B, H, T, d)` and `(B, KV, S, d)`."""
    heads = {"q_num_heads": config.heads, "kv_num_heads": config.kv_heads} if q.ndim == 3 else {}
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    attributes: dict[str, Any] = {"scale": config.scale, "softcap": config.attention_softcap, **heads}
    return torch.onnx.ops.symbolic("Attention", inputs, attributes, dtype=q.dtype, shape=q.shape)


def _group_query_attention(
    q: Tensor, k: Tensor, v: Tensor, layer: int, context: CachedContext, bias: Tensor | None
) -> Tensor:
    """`q (B, T, H, d)` and `k, v (B, T, KV, d)` to `(B, T, H * d)`."""
    config = context.config
    tables = context.tables.get(config.layer_kind(layer))
    if tables is None:
        q, k = context.rotated(q, k, layer)
    past_key, past_value = context.past[layer]
    heads, width = q.shape[2], q.shape[3]
    padding = past_key.shape[3] - width
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    out, key, value = _operator(
        q.flatten(2),
        k.flatten(2),
        v.flatten(2),
        (past_key, past_value),
        context,
        None if bias is None else bias.to(q.dtype),
        heads,
        tables,
        config.layer_window(layer),
        config.attention_softcap,
    )
    context.present.append((key, value))
    if padding:
        out = out.reshape(*out.shape[:2], heads, -1)[..., :width].flatten(2)
    return out


def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor],
    context: CachedContext,
    bias: Tensor | None,
    heads: int,
    tables: Angles | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on `q (B, T, heads * width)` and `k, v (B, T, KV * width)`: output, and the cache of this layer."""
    config = context.config
    inputs = [q, k, v, *past, context.last, context.total, *(tables or (None, None)), None, bias]
    while inputs[-1] is None:
        inputs.pop()
    out, key, value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        {
            "num_heads": heads,
            "kv_num_heads": config.kv_heads,
            "do_rotary": int(tables is not None),
            "scale": config.scale,
            "softcap": softcap,
            "local_window_size": window or -1,
        },
        dtypes=[q.dtype] * 3,
        shapes=[q.shape, past[0].shape, past[1].shape],
        version=1,
    )
    return out, key, value
