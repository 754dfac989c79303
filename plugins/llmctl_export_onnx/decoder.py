"""A decoder as one graph: one fused attention operator per layer over a cache that is updated in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from llmctl.nn.attention import Angles, Memory, angles_of
from llmctl.nn.onnx_attention import CachedContext, cache_layers, cache_width, rotary_tables, rotates_inside
from llmctl.nn.transformer import Transformer
from llmctl_export_onnx import graph

Cache = list[tuple[Tensor, Tensor]]
KEEP = "num_logits_to_keep"
"""Name of the optional input; the one that transformers.js knows it by."""
_AFTER_HEAD = ("Add", "Cast", "Div", "Mul", "Tanh")
"""What may stand between the head's product and the logits: a bias, a scale, a cap."""


class Traced(nn.Module):
    """The transformer with the inputs and outputs that onnxruntime-genai's decoder-only models have."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.tables: dict[str, Angles] = {}
        tables = rotary_tables(model.config)  # refuses what no graph can compute
        if rotates_inside(model.config):
            self._keep(tables)

    def _keep(self, tables: dict[str, Angles]) -> None:
        dtype = self.model.embedding.weight.dtype
        for kind, (cos, sin) in sorted(tables.items()):
            first = next((k for k, (known, _) in self.tables.items() if torch.equal(known, cos.to(dtype))), None)
            self.tables[kind] = (cos.to(dtype), sin.to(dtype)) if first is None else self.tables[first]
            for name, table in zip(("cos", "sin"), self.tables[kind], strict=True):
                self.register_buffer(f"{name}_{kind}", table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """`input_ids (B, T)`, `attention_mask (B, total)` int64; logits `(B, T, V)` and the new cache.

        A row's real tokens come first; their number is the sum of its mask.
        """
        context = self.context(input_ids, attention_mask, past)
        logits = self.model(input_ids, context.positions, context=context)
        return logits, [*context.present, *context.remembered]

    def context(
        self, input_ids: Tensor, attention_mask: Tensor, past: Cache, memory: Memory | None = None
    ) -> CachedContext:
        """What all layers share."""
        config, length = self.model.config, input_ids.shape[1]
        lengths = attention_mask.sum(1)
        steps = torch.arange(length, device=input_ids.device)
        # As GroupQueryAttention counts: a first prompt starts at 0 even where it is padded, later tokens end the row.
        positions = (lengths - length).clamp(min=0)[:, None] + steps
        width = torch.onnx.ops.symbolic("Shape", [attention_mask], {"start": 1, "end": 2}, dtype=torch.int64, shape=[1])
        return CachedContext(
            config,
            rotary={} if self.tables else angles_of(config, positions, 0),
            bias=self.model.bias(positions, attention_mask.shape[1]),
            memory=memory,
            past=past,
            positions=positions,
            width=attention_mask.shape[1],
            last=(lengths - 1).to(torch.int32),
            total=width.to(torch.int32),
            tables=self.tables,
        )


def trace(model: Transformer, opset: int) -> ir.Model:
    """Trace `model` with dynamic batch and lengths; names as onnxruntime-genai expects them."""
    cache, axes, names = cache_of(model)
    traced = graph.trace(
        Traced(model),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64), cache),
        ({0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: "total_sequence_length"}, axes),
        ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
        opset,
        "decoder",
    )
    finish(traced)
    return traced


def cache_of(model: Transformer, infix: str = "") -> tuple[Cache, list[Any], list[str]]:
    """An example of the cache, its dynamic axes, and the names of its tensors."""
    config = model.config
    shape = (2, config.kv_heads, 5, cache_width(config))
    zeros = torch.zeros(shape, dtype=model.embedding.weight.dtype)
    axes = {0: "batch_size", 2: "past_sequence_length"}
    layers = range(cache_layers(config))
    names = [f"{layer}{infix}.{kind}" for layer in layers for kind in ("key", "value")]
    return [(zeros.clone(), zeros.clone()) for _ in layers], [(axes, axes)] * len(layers), names


def keep_last(traced: ir.Model) -> None:
    """Give the graph the optional input `num_logits_to_keep`, int64 `(1,)`: logits of so many last tokens alone.

    Its default 0, an initializer that may be overridden, keeps all of them, so runtimes that do not know it get what
    they expect. Who reads a prompt needs one row of logits: the head of a large vocabulary is a third of a small model.
    """
    graph = traced.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    head = _head(logits)
    hidden = head.inputs[0] if head is not None else None
    if head is None or hidden is None:
        return
    count = ir.Value(name=KEEP, shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.INT64))
    count.const_value = ir.tensor(np.zeros(1, np.int64), name=KEEP)
    start = ir.node("Neg", [count])
    ends = {
        name: ir.Value(name=f"{KEEP}.{name}", const_value=ir.tensor(np.array([value], np.int64), name=f"{KEEP}.{name}"))
        for name, value in (("end", np.iinfo(np.int64).max), ("axis", 1))
    }
    rest = ir.node("Slice", [hidden, start.outputs[0], ends["end"], ends["axis"]])
    rest.outputs[0].type = hidden.type
    graph.inputs.append(count)
    for value in (count, *ends.values()):
        graph.register_initializer(value)
    graph.insert_before(head, [start, rest])
    head.replace_input_with(0, rest.outputs[0])
    if logits.shape is not None:
        logits.shape = ir.Shape((logits.shape[0], "kept_length", logits.shape[2]))


def _head(logits: ir.Value) -> ir.Node | None:
    """The product of the head; None where something unknown makes the logits."""
    node = logits.producer()
    while node is not None and node.op_type in _AFTER_HEAD:
        made = [value.producer() for value in node.inputs if value is not None]
        node = next((one for one in made if one is not None), None)
    return node if node is not None and node.op_type in ("MatMul", "FusedMatMul") else None


def finish(traced: ir.Model) -> None:
    """Name the rotary tables, and the length of the cache that comes out."""
    tables: dict[int, ir.Value] = {}
    for node in (node for node in traced.graph if node.op_type == "GroupQueryAttention"):
        for name, table in zip(("cos_cache", "sin_cache"), node.inputs[7:9], strict=False):
            if table is not None and id(table) not in tables:
                tables[id(table)] = table
                table.name = name if len(tables) <= 2 else f"local_{name}"
    for value in traced.graph.outputs:
        if value.shape is not None and str(value.name).startswith("present") and ".encoder." not in str(value.name):
            batch, heads, _, width = value.shape
            value.shape = ir.Shape((batch, heads, "total_sequence_length", width))
