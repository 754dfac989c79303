"""The constant matrices of a graph and the nodes that read them: what there is to quantize."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from llmctl.errors import InputError

MICROSOFT = "com.microsoft"
NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The constants of `graph` by name; defaults of inputs, such as those of adapters, are none."""
    given = {value.name for value in graph.input}
    return {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}


def matrix_of(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> tuple[str | None, bool]:
    """The constant float matrix that a node reads, and whether it is a table `(N, K)` rather than a factor `(K, N)`."""
    table = node.op_type == "Gather" and attribute(node, "axis", 0) == 0
    tied = {"transA": 0, "transB": 1, "transBatchA": 0, "transBatchB": 0, "alpha": 1.0}
    head = node.op_type == "FusedMatMul" and all(attribute(node, k, k == "alpha") == v for k, v in tied.items())
    if not (table or head or node.op_type == "MatMul"):
        return None, False
    name = node.input[0] if table else node.input[1]
    tensor = constants.get(name)
    floats = tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
    return (name if floats else None), table or head


def products_of(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, str, bool]]:
    """Every product with a constant float matrix: the node, the matrix's name, whether it is a table `(N, K)`."""
    constants = constants_of(graph)
    found = [(node, *matrix_of(node, constants)) for node in graph.node if node.op_type != "Gather"]
    return [(node, name, table) for node, name, table in found if name is not None]


def refuse_halves(graph: onnx.GraphProto) -> None:
    """Half of the digits are gone there: quantized from it, a matrix would be worse than it need be."""
    constants = constants_of(graph)
    halves: dict[int, str] = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
    for node in graph.node:
        tensor = constants.get(node.input[1]) if node.op_type in ("MatMul", "FusedMatMul") else None
        if tensor is not None and tensor.data_type in halves:
            raise InputError(
                f"the graph's matrices are {halves[tensor.data_type]}, and quantization starts from float32",
                hint="export the model again with `dtype: float32`, and quantize that",
            )


def split_gemm(graph: onnx.GraphProto) -> None:
    """A plain Gemm (foreign GPT-2 graphs) is a MatMul and an Add."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        defaults = {"alpha": 1.0, "beta": 1.0}
        if node.op_type != "Gemm" or any(attribute(node, k, defaults.get(k, 0)) != v for k, v in plain.items()):
            nodes.append(node)
            continue
        out = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
        nodes.append(helper.make_node("MatMul", node.input[:2], [out], name=node.name))
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [out, node.input[2]], [node.output[0]], name=f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)


def put(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Make `nodes` the graph of `model`, which then has the operators of ONNX Runtime, and drop unread constants."""
    graph = model.graph
    del graph.node[:]
    graph.node.extend(nodes)
    if all(opset.domain != MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    read = {name for node in graph.node for name in node.input} | {out.name for out in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, or `default`."""
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)
