"""Our transformer as an ONNX graph: one fused attention operator per layer, every weight stored once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from llmctl.errors import StageError
from llmctl.nn.onnx_attention import OnnxContext, cache_width, rotary_tables, rotates_inside
from llmctl.nn.transformer import Transformer
from llmctl_export_onnx.silence import quiet

DATA = "model.onnx.data"
MICROSOFT = "com.microsoft"


class Traced(nn.Module):
    """The transformer with the inputs and outputs that onnxruntime-genai's decoder-only models have."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.tables: tuple[Tensor, Tensor] | None = None
        if rotates_inside(model.config):
            cos, sin = rotary_tables(model.config)
            self.register_buffer("cos", cos)
            self.register_buffer("sin", sin)
            self.tables = (cos, sin)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """`input_ids (B, T)`, `attention_mask (B, total)` int64; logits `(B, T, V)` and the new cache.

        A row's real tokens come first; their number is the sum of its mask.
        """
        lengths = attention_mask.sum(1)
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        # As GroupQueryAttention counts: a first prompt starts at 0 even where it is padded, later tokens end the row.
        positions = (lengths - input_ids.shape[1]).clamp(min=0)[:, None] + steps
        width = torch.onnx.ops.symbolic("Shape", [attention_mask], {"start": 1, "end": 2}, dtype=torch.int64, shape=[1])
        context = self.model.attention_context(input_ids, positions, None, None)
        context = OnnxContext(
            self.model.config,
            rotary=context.rotary,
            past=past,
            last=(lengths - 1).to(torch.int32),
            total=width.to(torch.int32),
            tables=self.tables,
        )
        logits = self.head(self.model.hidden(input_ids, positions, context=context))
        return logits, context.present

    def head(self, hidden: Tensor) -> Tensor:
        """The output head. Tied, it reads the embedding as it lies; a MatMul would store it again, transposed."""
        if self.model.unembedding is not None:
            return self.model.head(hidden)
        shape = [*hidden.shape[:2], self.model.config.vocab_size]
        inputs = [hidden, self.model.head_weight]
        return torch.onnx.ops.symbolic(
            f"{MICROSOFT}::FusedMatMul", inputs, {"transB": 1}, dtype=hidden.dtype, shape=shape, version=1
        )


def trace(model: Transformer, opset: int) -> ir.Model:
    """Trace `model` with dynamic batch and lengths; names as onnxruntime-genai expects them."""
    config = model.config
    layers = range(config.layers)
    shape = (2, config.kv_heads, 5, cache_width(config))
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in layers]
    cache = {0: "batch_size", 2: "past_sequence_length"}
    kinds = [(i, kind) for i in layers for kind in ("key", "value")]
    with quiet("torch.onnx", "torch.export", "onnxscript"):
        program = torch.onnx.export(
            Traced(model).eval(),
            (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64), past),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(
                {0: "batch_size", 1: "sequence_length"},
                {0: "batch_size", 1: "total_sequence_length"},
                [(cache, cache)] * len(layers),
            ),
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{i}.{kind}" for i, kind in kinds)],
            output_names=["logits", *(f"present.{i}.{kind}" for i, kind in kinds)],
        )
    if program is None:
        raise StageError("torch.onnx.export returned no program")
    return _tidy(program.model)


def save(model: ir.Model, directory: Path) -> None:
    """Write `model.onnx` and its weights, `model.onnx.data`, and have ONNX check them."""
    import onnx

    try:
        ir.save(model, directory / "model.onnx", external_data=DATA, size_threshold_bytes=1024)
    except OSError as error:
        raise StageError(f"cannot write {directory / 'model.onnx'}: {error}", hint="is the disk full?") from error
    onnx.checker.check_model(str(directory / "model.onnx"))


def count_operators(model: ir.Model, name: str) -> int:
    """How many nodes of the operator `name` the graph has."""
    return sum(node.op_type == name for node in model.graph)


def account_weights(graph: ir.Model, model: nn.Module) -> None:
    """Name every stored weight after its parameter of `model`.

    StageError, naming the parameter, unless each is stored and none of them twice. Transposed counts as the same
    weight; equal weights (fresh norms) may share a place.
    """
    stored: dict[str, list[ir.Value]] = {}
    for value in graph.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            stored.setdefault(_digest(value.const_value.numpy()), []).append(value)
    weights: dict[str, list[str]] = {}
    for name, weight in model.named_parameters():
        weights.setdefault(_digest(weight.detach().numpy()), []).append(name)
    for digest, names in weights.items():
        values = stored.get(digest, [])
        if not 1 <= len(values) <= len(names):
            raise StageError(f"the graph holds the weight {names[0]} {len(values)} times instead of once")
        for value, name in zip(values, names, strict=False):
            value.name = name


def _digest(array: np.ndarray) -> str:
    """Equal for a tensor and its transpose."""
    views = (array, array.T) if array.ndim == 2 else (array,)
    return min(hashlib.blake2b(np.ascontiguousarray(view).data, digest_size=16).hexdigest() for view in views)


def _drop_reshapes(model: ir.Model) -> None:
    """Leave out splitting into heads and joining again where nothing happens in between."""
    for attention in _attentions(model):
        for index in range(3):
            joined = attention.inputs[index]
            split = _reshaped(joined)
            source = _reshaped(split)
            if source is not None and joined is not None and _same_width(source, joined):
                attention.replace_input_with(index, source)
    RemoveUnusedNodesPass()(model)


def _same_width(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and b.shape is not None and a.shape[-1] == b.shape[-1]


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def _reshaped(value: ir.Value | None) -> ir.Value | None:
    """What a Reshape was given, if `value` comes from one."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else None


def _tidy(model: ir.Model) -> ir.Model:
    """Drop what the exporter notes about its work (half of a small file) and name what the tracer left open."""
    _drop_reshapes(model)
    for name, table in zip(("cos_cache", "sin_cache"), _attentions(model)[0].inputs[7:], strict=False):
        if table is not None:
            table.name = name
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "decoder"
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    values = [*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs]
    values += [value for node in model.graph for value in node.outputs]
    for value in values:
        value.metadata_props.clear()
    for value in model.graph.outputs[1:]:
        if value.shape is not None:
            batch, heads, _, width = value.shape
            value.shape = ir.Shape((batch, heads, "total_sequence_length", width))
    model.producer_name, model.producer_version = "llmctl", None
    model.functions.clear()
    model.opset_imports.setdefault(MICROSOFT, 1)
    return model
