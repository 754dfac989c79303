"""Looking into a model while it computes: attention weights, and how long the vectors are that each sub-layer adds.

An attention backend of its own computes the weights in full, which the fast ones never hold; its output is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmctl.nn.attention import BACKENDS, AttentionContext, cross_mask, gather
from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Block, Transformer

NAME = "inspected"


@dataclass
class Maps:
    """The attention weights of one stack, each `(B, H, T, S)` on the CPU in float32, layer by layer.

    Rows sum to 1, or to 0 where a query may see nothing.
    """

    own: list[Tensor] = field(default_factory=list)
    """Of its tokens over themselves."""
    cross: list[Tensor] = field(default_factory=list)
    """Of a decoder over the source."""


@dataclass
class Norms:
    """Euclidean lengths per token of one stack, each `(B, T)`, layer by layer."""

    residual: list[Tensor] = field(default_factory=list)
    """What enters the first block, then what leaves each."""
    attention: list[Tensor] = field(default_factory=list)
    """What self-attention adds."""
    cross: list[Tensor] = field(default_factory=list)
    feed_forward: list[Tensor] = field(default_factory=list)


@dataclass
class Record:
    """What was seen of one forward: by stack, `decoder` or `encoder`."""

    maps: dict[str, Maps] = field(default_factory=dict)
    norms: dict[str, Norms] = field(default_factory=dict)


class Inspected:
    """The attention backend that computes the weights explicitly and keeps them in a record."""

    def __init__(self, record: Record, kind: str) -> None:
        self.record, self.kind = record, kind

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, context: AttentionContext, bias: Tensor | None
    ) -> Tensor:
        """See `llmctl.nn.attention.Backend`."""
        q, k = context.rotated(q, k, layer)
        keys, values = gather(k, v, layer, context)
        length, total = q.shape[1], keys.shape[2]
        seen = context.visible(context.config.layer_window(layer), slice(0, length), slice(0, total), q.device)
        weights = attention_weights(q.transpose(1, 2), keys, seen, bias, context.config)
        self._maps(context).own.append(weights.float().cpu())
        return _weighted(weights, values)

    def cross(self, q: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """See `llmctl.nn.attention.Backend`."""
        memory = context.memory
        assert memory is not None
        keys, seen = memory.keys[layer], cross_mask(memory, context.documents)
        weights = attention_weights(q.transpose(1, 2), keys, seen, None, context.config)
        self._maps(context).cross.append(weights.float().cpu())
        return _weighted(weights, memory.values[layer])

    def _maps(self, context: AttentionContext) -> Maps:
        name = "encoder" if self.kind == "encoder" or (self.kind != "decoder" and not context.causal) else "decoder"
        return self.record.maps.setdefault(name, Maps())


def attention_weights(q: Tensor, keys: Tensor, seen: Tensor | None, bias: Tensor | None, config: ModelConfig) -> Tensor:
    """softmax(scale q k' + bias) of `q (B, H, T, d)` over `keys (B, KV, S, d)`: `(B, H, T, S)`, 0 where not `seen`."""
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    scores = (q @ keys.transpose(-1, -2)) * config.scale
    if config.attention_softcap:
        scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
    if bias is not None:
        scores = scores + bias
    precise = torch.promote_types(q.dtype, torch.float32)
    if seen is None:
        return scores.softmax(-1, dtype=precise).to(q.dtype)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=precise).to(q.dtype)
    return weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """The means of `values (B, KV, S, d)` under `weights (B, H, T, S)`, `(B, T, H * d)`."""
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
    return (weights @ values).transpose(1, 2).flatten(2)


@contextmanager
def recording(model: Transformer) -> Iterator[Record]:
    """Within it every forward of `model` adds to the record; one forward per record.

    Attention then costs memory with the square of the length. Not for models that run elsewhere at the same time.
    """
    record = Record()
    before, BACKENDS[NAME] = model.backend, Inspected(record, model.config.traits.kind)
    stacks = {"encoder" if model.config.traits.kind == "encoder" else "decoder": model.blocks}
    if model.encoder is not None:
        stacks["encoder"] = model.encoder.blocks
    handles = [handle for name, blocks in stacks.items() for handle in _watch(blocks, record, name)]
    model.backend = NAME
    try:
        yield record
    finally:
        model.backend = before
        del BACKENDS[NAME]
        for handle in handles:
            handle.remove()


def _watch(blocks: nn.ModuleList, record: Record, name: str) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Hooks that measure what leaves each block and what its sub-layers add."""
    norms = record.norms.setdefault(name, Norms())

    def measure(found: list[Tensor], module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _arguments: tuple[object, ...], output: Tensor) -> None:
            found.append(_lengths(output))

        return module.register_forward_hook(hook)

    def first(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        norms.residual.append(_lengths(arguments[0]))

    yield blocks[0].register_forward_pre_hook(first)
    for block in blocks:
        assert isinstance(block, Block)
        # What is added to the sum is the output of the norm behind the sub-layer, where there is one.
        yield measure(norms.attention, block.attention_after or block.attention)
        if block.cross is not None:
            yield measure(norms.cross, block.cross)
        yield measure(norms.feed_forward, block.ffn_after or block.ffn)
        yield measure(norms.residual, block)


def _lengths(x: Tensor) -> Tensor:
    return x.detach().float().norm(dim=-1).cpu()  # type: ignore[no-any-return]  # torch
