"""From a traced module to an ONNX graph on disk: tidy, every weight stored once and accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions
from torch import nn

from llmctl.errors import StageError
from llmctl.nn.transformer import OffsetRMSNorm
from llmctl_export_onnx.silence import quiet

DATA = "model.onnx.data"
"""The weights of all graphs of a bundle."""
MICROSOFT = "com.microsoft"
LARGE = 1024
"""Bytes from which a tensor is stored beside the graph."""


def trace(
    module: nn.Module,
    arguments: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    name: str,
) -> ir.Model:
    """Trace `module`, called with `arguments`; `dynamic` names the axes that may vary, in the same structure."""
    with quiet("torch.onnx", "torch.export", "onnxscript"):
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic,
            input_names=list(inputs),
            output_names=list(outputs),
            optimize=False,
        )
        if program is None:
            raise StageError("torch.onnx.export returned no program")
        model = program.model
        optimizer.optimize_ir(model, should_fold=_may_be_folded)
        onnx_fusions.fuse(model)
    _tie(model)
    _drop_reshapes(model)
    RemoveUnusedNodesPass()(model)
    _strip(model, name)
    return model


def _may_be_folded(node: ir.Node) -> bool | None:
    """Products with a weight are left to ONNX Runtime, which folds them when it loads the graph; else the weight of a
    small model would be gone from the file."""
    return False if node.op_type in ("MatMul", "Gemm") else None


def save(graphs: Mapping[str, ir.Model], directory: Path) -> None:
    """Write each graph under its file name, and the weights of all, equal ones once, to `model.onnx.data`.

    ONNX checks what was written. StageError if it cannot be written.
    """
    import onnx

    stored: dict[str, ir.Value] = {}
    values: list[tuple[ir.Value, str]] = []
    for model in graphs.values():
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.nbytes >= LARGE:
                key = f"{value.const_value.dtype} {list(value.const_value.shape)} {_digest(value.const_value.numpy())}"
                values.append((value, key))
                stored.setdefault(key, value)
    try:
        tensors = [value.const_value for value in stored.values() if value.const_value is not None]
        outside = ir.external_data.convert_tensors_to_external(tensors, directory, DATA) if tensors else []
        places = dict(zip(stored, outside, strict=True))
        for value, key in values:
            value.const_value = places[key]
        for file, model in graphs.items():
            ir.save(model, directory / file)
    except OSError as error:
        raise StageError(f"cannot write into {directory}: {error}", hint="is the disk full?") from error
    for file in graphs:
        onnx.checker.check_model(str(directory / file))


def count_operators(model: ir.Model, name: str) -> int:
    """How many nodes of the operator `name` the graph has."""
    return sum(node.op_type == name for node in model.graph)


def account_weights(graphs: Sequence[ir.Model], model: nn.Module) -> None:
    """Name every stored weight after its parameter of `model`.

    StageError, naming the parameter, unless each is in one of the graphs and in none twice. Transposed counts as the
    same weight; equal weights (fresh norms) may share a place, and zeros that are added (fresh biases) may be gone.
    """
    weights: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for name, weight in model.named_parameters():
        # The tracer stores Gemma's gains, 1 + weight in float32, ready-made.
        offset = isinstance(model.get_submodule(name.rpartition(".")[0]), OffsetRMSNorm)
        array = 1 + weight.float() if offset else weight
        digest = _either_way(array.detach().numpy())
        weights.setdefault(digest, []).append(name)
        if name.endswith("weight") or array.any():
            missing.setdefault(digest, name)
    for graph in graphs:
        stored: dict[str, list[ir.Value]] = {}
        for value in graph.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype.is_floating_point():
                stored.setdefault(_either_way(value.const_value.numpy()), []).append(value)
        for digest, names in weights.items():
            values = stored.get(digest, [])
            if len(values) > len(names):
                raise _held(names[0], len(values))
            if values:
                missing.pop(digest, None)
            for value, name in zip(values, names, strict=False):
                value.name = name
    if missing:
        raise _held(next(iter(missing.values())), 0)


def _held(name: str, count: int) -> StageError:
    return StageError(f"the graph holds the weight {name} {count} times instead of once")


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def _either_way(array: np.ndarray) -> str:
    """Equal for a tensor and its transpose."""
    return min(map(_digest, (array, array.T) if array.ndim == 2 else (array,)))


def _tie(model: ir.Model) -> None:
    """Have a tied head read the embedding as it lies.

    The tracer transposes it for the head: a small one it stores a second time, a large one it leaves to be transposed
    whenever the graph is loaded.
    """
    tables = [node.inputs[0] for node in model.graph if node.op_type == "Gather"]
    known = {id(value): value for value in tables if _matrix(value) is not None}
    transposed = {_digest(_matrix(value).T): value for value in known.values()}  # type: ignore[union-attr]
    shapes = {_matrix(value).T.shape for value in known.values()}  # type: ignore[union-attr]
    for node in list(model.graph):
        factor = node.inputs[1] if node.op_type == "MatMul" else None
        table = _turned(factor)
        if id(table) not in known:
            array = _matrix(factor)
            if array is None or array.shape not in shapes:
                continue
            table = transposed.get(_digest(array))
        if table is None:
            continue
        node.domain, node.op_type = MICROSOFT, "FusedMatMul"
        node.attributes["transB"] = ir.AttrInt64("transB", 1)
        node.replace_input_with(1, table)
        if factor is not None and factor.name is not None and factor.is_initializer() and not factor.uses():
            del model.graph.initializers[factor.name]


def _turned(value: ir.Value | None) -> ir.Value | None:
    """What is transposed to give `value`, if it is a matrix that is."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == "Transpose" else None


def _matrix(value: ir.Value | None) -> np.ndarray | None:
    """A stored matrix of floats."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    if tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
        return None
    return tensor.numpy()


def _drop_reshapes(model: ir.Model) -> None:
    """Leave out splitting into heads and joining again where nothing happens in between."""
    for attention in (node for node in model.graph if node.op_type in ("GroupQueryAttention", "Attention")):
        for index in range(3):
            joined = attention.inputs[index]
            split = _reshaped(joined)
            source = _reshaped(split)
            if source is not None and joined is not None and _same_width(source, joined):
                attention.replace_input_with(index, source)


def _same_width(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and b.shape is not None and len(a.shape) == len(b.shape) and a.shape[-1] == b.shape[-1]


def _reshaped(value: ir.Value | None) -> ir.Value | None:
    """What a Reshape was given, if `value` comes from one."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else None


def _strip(model: ir.Model, name: str) -> None:
    """Drop what the exporter notes about its work: half of a small file."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = name
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    values = [*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs]
    values += [value for node in model.graph for value in node.outputs]
    for value in values:
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "llmctl", None
    model.functions.clear()
    model.opset_imports.setdefault(MICROSOFT, 1)
