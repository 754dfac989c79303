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
from llmctl_quantize.tables import Method, Table

MICROSOFT = "com.microsoft"


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
    _split_gemm(graph)
    given = {value.name for value in graph.input}  # defaults of inputs, such as those of adapters, are no weights
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
    _refuse_halves(graph, constants)
    done: dict[str, Stored] = {}
    nodes: list[onnx.NodeProto] = []
    products = 0
    for node in graph.node:
        name, table = _matrix_of(node, constants)
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
    del graph.node[:]
    graph.node.extend(nodes)
    if all(opset.domain != MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    _drop_unused(graph)


def _refuse_halves(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]) -> None:
    """Half of the digits are gone there: quantized from it, a matrix would be worse than it need be."""
    halves: dict[int, str] = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
    for node in graph.node:
        tensor = constants.get(node.input[1]) if node.op_type in ("MatMul", "FusedMatMul") else None
        if tensor is not None and tensor.data_type in halves:
            raise InputError(
                f"the graph's matrices are {halves[tensor.data_type]}, and quantization starts from float32",
                hint="export the model again with `dtype: float32`, and quantize that",
            )


def _matrix_of(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> tuple[str | None, bool]:
    """The constant float matrix that a node reads, and whether it is a table `(N, K)` rather than a factor `(K, N)`."""
    table = node.op_type == "Gather" and _attribute(node, "axis", 0) == 0
    tied = {"transA": 0, "transB": 1, "transBatchA": 0, "transBatchB": 0, "alpha": 1.0}
    head = node.op_type == "FusedMatMul" and all(_attribute(node, k, k == "alpha") == v for k, v in tied.items())
    if not (table or head or node.op_type == "MatMul"):
        return None, False
    name = node.input[0] if table else node.input[1]
    tensor = constants.get(name)
    floats = tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    return (name if floats else None), table or head


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


def _split_gemm(graph: onnx.GraphProto) -> None:
    """A plain Gemm (foreign GPT-2 graphs) is a MatMul and an Add."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        defaults = {"alpha": 1.0, "beta": 1.0}
        if node.op_type != "Gemm" or any(_attribute(node, k, defaults.get(k, 0)) != v for k, v in plain.items()):
            nodes.append(node)
            continue
        out = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
        nodes.append(helper.make_node("MatMul", node.input[:2], [out], name=node.name))
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [out, node.input[2]], [node.output[0]], name=f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Nodes whose output nobody reads (blocks of a table that has no head), then initializers likewise."""
    used = {name for node in graph.node for name in node.input} | {out.name for out in graph.output}
    nodes = [node for node in graph.node if not node.name.endswith("_values_blocks") or node.output[0] in used]
    read = {name for node in nodes for name in node.input} | {out.name for out in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)
