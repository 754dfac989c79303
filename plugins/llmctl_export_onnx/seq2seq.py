"""An encoder-decoder as the three graphs of Optimum's layout, with one file of weights.

`encoder_model.onnx` reads the source. `decoder_model.onnx` says the first tokens and computes, once, the keys and
values of all cross-attention. `decoder_with_past_model.onnx` goes on: it is given both and returns its own.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn

from llmctl.nn.attention import PADDING, Memory
from llmctl.nn.onnx_attention import cache_width
from llmctl.nn.transformer import Transformer
from llmctl.ort.bundle import DECODER, DECODER_WITH_PAST, ENCODER
from llmctl.ort.seq2seq import SHARED
from llmctl_export_onnx import decoder, graph
from llmctl_export_onnx.decoder import Cache
from llmctl_export_onnx.encoder import check_opset

TEXT = {0: "batch_size", 1: "encoder_sequence_length"}
SAID = {0: "batch_size", 1: "sequence_length"}
SIDES = ("decoder", "encoder")
TOTAL = {0: "batch_size", 1: "total_sequence_length"}


def _documents(mask: Tensor) -> Tensor:
    return torch.where(mask != 0, 0, PADDING)


class Encoder(nn.Module):
    """`input_ids (B, S)`, `attention_mask (B, S)` to states `(B, S, D)`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See the class."""
        return self.model.encode(input_ids, _documents(attention_mask))


class First(decoder.Traced):
    """The decoder without a past: logits, its own cache, and the keys and values of the encoder's states."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> tuple[Tensor, Cache, Cache]:
        """`input_ids (B, T)`, `encoder_hidden_states (B, S, D)`; logits `(B, T, V)` and both caches."""
        config = self.model.config
        memory = self.model.memory(encoder_hidden_states, _documents(encoder_attention_mask))
        shape = (input_ids.shape[0], config.kv_heads, 0, cache_width(config))
        empty = torch.zeros(shape, dtype=encoder_hidden_states.dtype)
        context = self.context(input_ids, attention_mask, [(empty, empty)] * config.layers, memory)
        logits = self.model(input_ids, context.positions, context=context, memory=memory)
        return logits, context.present, list(zip(memory.keys, memory.values, strict=True))


class Further(decoder.Traced):
    """The decoder's further steps."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, encoder_attention_mask: Tensor, past: list[list[Tensor]]
    ) -> tuple[Tensor, Cache]:
        """`past`, per layer: keys and values as in a decoder, then those of the source, `(B, KV, S, d)`."""
        keys, values = [layer[2] for layer in past], [layer[3] for layer in past]
        memory = Memory(keys, values, _documents(encoder_attention_mask))
        context = self.context(input_ids, attention_mask, [(layer[0], layer[1]) for layer in past], memory)
        logits = self.model(input_ids, context.positions, context=context, memory=memory)
        return logits, context.present


def trace(model: Transformer, opset: int) -> dict[str, ir.Model]:
    """The graphs by file name, with dynamic batch and lengths."""
    check_opset(opset)
    graphs = {ENCODER: _encoder(model, opset), DECODER: _first(model, opset), DECODER_WITH_PAST: _further(model, opset)}
    for name in (DECODER, DECODER_WITH_PAST):
        decoder.finish(graphs[name])
    graphs[DECODER_WITH_PAST].metadata_props[SHARED] = "1"
    return graphs


def _encoder(model: Transformer, opset: int) -> ir.Model:
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    return graph.trace(Encoder(model), (ids, mask), (TEXT, TEXT), names, ["last_hidden_state"], opset, "encoder")


def _first(model: Transformer, opset: int) -> ir.Model:
    config = model.config
    states = torch.zeros(2, 4, config.dim, dtype=model.embedding.weight.dtype)
    said, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    own, read = (decoder.cache_of(model, infix)[2] for infix in (".decoder", ".encoder"))
    return graph.trace(
        First(model),
        (said, torch.ones(2, 3, dtype=torch.int64), states, mask),
        (SAID, SAID, TEXT, TEXT),
        ["input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"],
        ["logits", *(f"present.{name}" for name in [*own, *read])],
        opset,
        "decoder",
    )


def _further(model: Transformer, opset: int) -> ir.Model:
    config = model.config
    own, own_axes, names = decoder.cache_of(model, ".decoder")
    shape = (2, config.kv_heads, 4, config.head_dim)
    read = {0: "batch_size", 2: "encoder_sequence_length"}
    past = [[*pair, *(torch.zeros(shape, dtype=model.embedding.weight.dtype) for _ in "kv")] for pair in own]
    axes = [[*pair, read, read] for pair in own_axes]
    # In this order Optimum fills them in.
    inputs = [f"{i}.{side}.{kind}" for i in range(config.layers) for side in SIDES for kind in ("key", "value")]
    return graph.trace(
        Further(model),
        (
            torch.ones(2, 3, dtype=torch.int64),
            torch.ones(2, 8, dtype=torch.int64),
            torch.ones(2, 4, dtype=torch.int64),
            past,
        ),
        (SAID, TOTAL, TEXT, axes),
        ["input_ids", "attention_mask", "encoder_attention_mask", *(f"past_key_values.{name}" for name in inputs)],
        ["logits", *(f"present.{name}" for name in names)],
        opset,
        "decoder_with_past",
    )
