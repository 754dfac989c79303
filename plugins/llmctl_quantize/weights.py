"""Weight-only quantization of a graph: matrix products become MatMulNBits, embedding tables GatherBlockQuantized.

A head tied to its embedding (FusedMatMul with transB, as `export-onnx` writes it) and the embedding go on sharing one
table: GatherBlockQuantized reads it as rows, MatMulNBits the same bytes as blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from llmctl.errors import InputError
from llmctl_quantize.matrices import MICROSOFT, constants_of, matrix_of, put, refuse_halves, split_gemm
from llmctl_quantize.tables import Method, Table


@dataclass(frozen=True)
class Stored:
    """A quantized `(N, K)` matrix in the graph: where its parts are and how they are to be read."""

    parts: tuple[str, ...]
    """Names of the values, the scales and, where there are any, the zero points."""
    shape: tuple[int, ...]
    bits: int
    block: int


def quantize(
    model: onnx.ModelProto,
    method: Method,
    *,
    bits: int,
    block: int,
    symmetric: bool,
    embedding_bits: int,
    accuracy: int,
) -> None:
    """Quantize `model`, whose weights are in memory, in place.

    InputError if it has no product to quantize, or one with a matrix of half precision.
    """
    graph = model.graph
    split_gemm(graph)
    refuse_halves(graph)
    constants = constants_of(graph)
    done: dict[str, Stored] = {}
    nodes: list[onnx.NodeProto] = []
    products = 0
    for node in graph.node:
        name, table = matrix_of(node, constants)
        width = embedding_bits if table else bits
        if name is None or not width:
            nodes.append(node)
            continue
        if name not in done:
            matrix = numpy_helper.to_array(constants[name])
            matrix = matrix if table else matrix.T
            done[name] = _store(graph, name, method(matrix, width, block, symmetric), matrix.shape, width, block)
            if table:
                nodes.append(_as_blocks(graph, done[name]))
        if node.op_type == "Gather":
            nodes += _gather(graph, node, done[name])
        else:
            nodes.append(_product(node, done[name], table, accuracy))
            products += 1
    if not products:
        raise InputError("the graph has no product with a constant float matrix", hint="is it already quantized?")
    used = {name for node in nodes for name in node.input} | {out.name for out in graph.output}
    # The blocks of a table that has no head are read by nobody.
    put(model, [node for node in nodes if not node.name.endswith("_values_blocks") or node.output[0] in used])


def _store(graph: onnx.GraphProto, name: str, found: Table, shape: tuple[int, ...], bits: int, block: int) -> Stored:
    """Add the parts to the graph, all of them `(N, …)`; `_product` and `_gather` say how they are read."""
    names = []
    for kind, array in (("values", found.values), ("scales", found.scales), ("zero_points", found.zero_points)):
        if array is not None:
            names.append(f"{name}_{kind}")
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), names[-1]))
    return Stored(tuple(names), shape, bits, block)


def _as_blocks(graph: onnx.GraphProto, stored: Stored) -> onnx.NodeProto:
    """A table is stored flat, as Gather reads it; this makes its blocks.

    The Reshape of a constant is folded when a session is opened, so it costs nothing and the file holds one table.
    """
    values = stored.parts[0]
    tensor = next(tensor for tensor in graph.initializer if tensor.name == values)
    graph.initializer.append(numpy_helper.from_array(np.array(tensor.dims, np.int64), f"{values}_shape"))
    flat = numpy_helper.to_array(tensor).reshape(tensor.dims[0], -1)
    tensor.CopyFrom(numpy_helper.from_array(flat, values))
    return helper.make_node("Reshape", [values, f"{values}_shape"], [f"{values}_blocks"], name=f"{values}_blocks")


def _product(node: onnx.NodeProto, stored: Stored, table: bool, accuracy: int) -> onnx.NodeProto:
    values, *rest = stored.parts
    # 0 is said by leaving it out: most execution providers do not know the attribute.
    level: dict[str, Any] = {"accuracy_level": accuracy} if accuracy else {}
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], f"{values}_blocks" if table else values, *rest],
        [node.output[0]],
        name=f"{node.name or node.output[0]}_Q{stored.bits}",
        domain=MICROSOFT,
        bits=stored.bits,
        block_size=stored.block,
        K=stored.shape[1],
        N=stored.shape[0],
        **level,
    )


def _gather(graph: onnx.GraphProto, node: onnx.NodeProto, stored: Stored) -> list[onnx.NodeProto]:
    """Rows of the table; where K is no multiple of the block, its padding is cut off again."""
    values, *rest = stored.parts
    padded = stored.shape[1] % stored.block != 0
    out = f"{node.output[0]}_padded" if padded else node.output[0]
    made = [
        helper.make_node(
            "GatherBlockQuantized",
            [values, node.input[1], *rest],
            [out],
            name=f"{node.name or node.output[0]}_Q{stored.bits}",
            domain=MICROSOFT,
            bits=stored.bits,
            block_size=stored.block,
            gather_axis=0,
            quantize_axis=1,
        )
    ]
    if padded:
        bounds = []
        for kind, value in (("start", 0), ("end", stored.shape[1]), ("axis", -1)):
            bounds.append(f"{node.output[0]}_{kind}")
            graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), bounds[-1]))
        made.append(helper.make_node("Slice", [out, *bounds], [node.output[0]], name=f"{out}_cut"))
    return made
