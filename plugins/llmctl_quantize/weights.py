"""Weight-only quantization of a graph: matrix products become MatMulNBits, embedding tables GatherBlockQuantized.

A head tied to its embedding (FusedMatMul with transB, as `export-onnx` writes it) and the embedding go on sharing one
table: GatherBlockQuantized reads it as rows, MatMulNBits the same bytes as blocks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from llmctl.errors import InputError

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Table:
    """One matrix `(N, K)` in blocks along K: `values (N, blocks, bytes)` uint8, `scales (N, blocks)` float,
    `zero_points (N, ceil(blocks * bits / 8))` uint8, or None where they are all 2 ** (bits - 1)."""

    values: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def quantize(
    model: onnx.ModelProto, *, bits: int, block: int, method: str, symmetric: bool, embedding_bits: int, accuracy: int
) -> onnx.ModelProto:
    """A quantized copy of `model` (weights in memory). InputError if there is nothing to quantize."""
    already = len(_products(model))
    _split_gemm(model)
    if embedding_bits:
        _quantize_tables(model, embedding_bits, block, symmetric)
    model = _quantize_products(model, bits, block, method, symmetric)
    products = _products(model)
    if len(products) == already:
        raise InputError("the graph has no product with a constant float matrix", hint="is it already quantized?")
    if accuracy:
        for node in products:
            _set_attribute(node, "accuracy_level", accuracy)
    if all(opset.domain != MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    _drop_unused(model)
    return model


def quantize_table(matrix: np.ndarray, bits: int, block: int, symmetric: bool) -> Table:
    """Round `matrix (N, K)` to nearest in blocks along K, by ONNX Runtime's own kernel."""
    module = _quantizer()
    config = module.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    kernel = module.DefaultWeightOnlyQuantizer(config)
    values, scales, zero_points = kernel.qbits_block_quant(np.ascontiguousarray(matrix.T))
    rows, blocks = values.shape[:2]
    zeros = None if symmetric else zero_points.reshape(rows, -1)
    return Table(values, scales.reshape(rows, blocks), zeros)


def _quantize_products(model: onnx.ModelProto, bits: int, block: int, method: str, symmetric: bool) -> onnx.ModelProto:
    """Every MatMul with a constant matrix, by ONNX Runtime's quantizer (never its GPTQ: it is round to nearest)."""
    module = _quantizer()
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"  # the quantizer looks nodes up by name
    configs: dict[str, Callable[[], Any]] = {
        "rtn": lambda: module.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits),
        "hqq": lambda: module.HQQWeightOnlyQuantConfig(block_size=block, bits=bits),
        "k-quant": lambda: module.KQuantWeightOnlyQuantConfig(
            customized_weight_config={node.name: {"bits": bits} for node in model.graph.node}
        ),
    }
    quantizer = module.MatMulNBitsQuantizer(
        model, block_size=block, is_symmetric=symmetric, algo_config=configs[method]()
    )
    odd = _pad_odd(model, block) if method == "k-quant" and bits == 4 else {}
    # k-quant draws a progress bar on stdout, where pipelines pass references; hqq makes torch warn of read-only arrays.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer.process()
    found: onnx.ModelProto = getattr(quantizer.model, "model", quantizer.model)  # ONNXModel, or k-quant's own wrapper
    _cut_odd(found, odd, block)
    return found


def _products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MatMulNBits"]


def _pad_odd(model: onnx.ModelProto, block: int) -> dict[str, int]:
    """Give matrices with an odd number of blocks one of zeros more: k-quant packs 4-bit zero points in pairs over the
    rows' ends. Returns the true K of each padded matrix."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    odd: dict[str, int] = {}
    for node in model.graph.node:
        tensor = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if tensor is None or len(tensor.dims) != 2 or tensor.name in odd or -(-tensor.dims[0] // block) % 2 == 0:
            continue
        odd[tensor.name] = tensor.dims[0]
        matrix = numpy_helper.to_array(tensor)
        rows = (-(-tensor.dims[0] // block) + 1) * block
        padded = np.concatenate([matrix, np.zeros((rows - len(matrix), matrix.shape[1]), matrix.dtype)])
        tensor.CopyFrom(numpy_helper.from_array(padded, tensor.name))
    return odd


def _cut_odd(model: onnx.ModelProto, odd: dict[str, int], block: int) -> None:
    """Take the added blocks off the quantized matrices again. A row's last zero point then fills half a byte."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in _products(model):
        name = node.input[2].removesuffix("_scale")
        if name not in odd:
            continue
        blocks = -(-odd[name] // block)
        for stored in node.input[1:3]:
            kept = np.ascontiguousarray(numpy_helper.to_array(constants[stored])[:, :blocks])
            constants[stored].CopyFrom(numpy_helper.from_array(kept, stored))
        _set_attribute(node, "K", odd[name])


def _quantize_tables(model: onnx.ModelProto, bits: int, block: int, symmetric: bool) -> None:
    """Replace every Gather of rows of a constant float matrix, and the head that is tied to it."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    done: dict[str, list[str]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        table = _table_of(node, constants)
        if table is None:
            nodes.append(node)
            continue
        matrix = numpy_helper.to_array(constants[table])
        if table not in done:
            done[table] = _store(graph, table, quantize_table(matrix, bits, block, symmetric))
        make = _gather if node.op_type == "Gather" else _product
        nodes += make(graph, node, done[table], matrix.shape, bits, block)
    del graph.node[:]
    graph.node.extend(nodes)


def _table_of(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> str | None:
    """The table that a Gather reads by rows, or that a tied head multiplies by."""
    if node.op_type == "Gather" and _attribute(node, "axis", 0) == 0:
        name = node.input[0]
    elif node.op_type == "FusedMatMul" and _attribute(node, "transB", 0) and not _attribute(node, "transA", 0):
        name = node.input[1]
    else:
        return None
    tensor = constants.get(name)
    floats = tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    return name if floats else None


def _store(graph: onnx.GraphProto, name: str, table: Table) -> list[str]:
    """Add the table to the graph; the names of its values, scales and, where there are any, zero points."""
    rows = table.values.shape[0]
    parts = {"values": table.values.reshape(rows, -1), "scales": table.scales, "zero_points": table.zero_points}
    names = []
    for kind, array in parts.items():
        if array is not None:
            graph.initializer.append(numpy_helper.from_array(array, f"{name}_{kind}"))
            names.append(f"{name}_{kind}")
    return names


def _gather(
    graph: onnx.GraphProto, node: onnx.NodeProto, names: list[str], shape: tuple[int, ...], bits: int, block: int
) -> list[onnx.NodeProto]:
    """Rows of the table; where K is no multiple of the block, its padding is cut off again."""
    values, *rest = names
    padded = shape[1] % block != 0
    out = f"{node.output[0]}_padded" if padded else node.output[0]
    made = [
        helper.make_node(
            "GatherBlockQuantized",
            [values, node.input[1], *rest],
            [out],
            name=f"{node.name or node.output[0]}_Q{bits}",
            domain=MICROSOFT,
            bits=bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )
    ]
    if padded:
        bounds = []
        for kind, value in (("start", 0), ("end", shape[1]), ("axis", -1)):
            bounds.append(f"{node.output[0]}_{kind}")
            graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), bounds[-1]))
        made.append(helper.make_node("Slice", [out, *bounds], [node.output[0]], name=f"{out}_cut"))
    return made


def _product(
    graph: onnx.GraphProto, node: onnx.NodeProto, names: list[str], shape: tuple[int, ...], bits: int, block: int
) -> list[onnx.NodeProto]:
    """The tied head. The Reshape of a constant is folded when a session is opened; the file holds the table once."""
    values, *rest = names
    blocks, bytes_each = -(-shape[1] // block), block * bits // 8
    target = numpy_helper.from_array(np.array([shape[0], blocks, bytes_each], np.int64), f"{values}_shape")
    graph.initializer.append(target)
    reshape = helper.make_node("Reshape", [values, target.name], [f"{values}_blocks"], name=f"{values}_blocks")
    product = helper.make_node(
        "MatMulNBits",
        [node.input[0], f"{values}_blocks", *rest],
        [node.output[0]],
        name=f"{node.name or node.output[0]}_Q{bits}",
        domain=MICROSOFT,
        bits=bits,
        block_size=block,
        K=shape[1],
        N=shape[0],
    )
    return [reshape, product]


def _split_gemm(model: onnx.ModelProto) -> None:
    """A plain Gemm (foreign GPT-2 graphs) is a MatMul and an Add; the quantizer knows only MatMul."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        if node.op_type != "Gemm" or any(_attribute(node, name, value) != value for name, value in plain.items()):
            nodes.append(node)
            continue
        out = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
        nodes.append(helper.make_node("MatMul", node.input[:2], [out], name=node.name))
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [out, node.input[2]], [node.output[0]], name=f"{node.name}_bias"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _drop_unused(model: onnx.ModelProto) -> None:
    """Initializers that no node reads any more."""
    used = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    if len(kept) < len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def _set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    for index, item in reversed(list(enumerate(node.attribute))):
        if item.name == name:
            del node.attribute[index]
    node.attribute.append(helper.make_attribute(name, value))


def _quantizer() -> Any:
    """ONNX Runtime's quantizer; its import sets up the root logger at INFO, which is not its business."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    return matmul_nbits_quantizer
