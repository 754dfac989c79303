"""Products in int8: weights rounded per output channel, activations per tensor to uint8 with a zero point.

`dynamic`: DynamicQuantizeLinear and MatMulInteger, the range of each tensor is found at run time. `static`: ranges are
constants of the graph, QuantizeLinear and DequantizeLinear around each product say so, and a runtime that knows integer
products takes them. Everything between products, attention, norms and softmax, stays float.

ONNX Runtime's own tools (`quantize_dynamic`, `quantize_static`) round the same way, which the tests compare, but they
leave a head tied to its embedding (FusedMatMul) as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llmctl.errors import InputError
from llmctl_quantize.matrices import constants_of, matrix_of, products_of, put, refuse_halves, split_gemm

WEIGHT_LIMIT, REDUCED_LIMIT = 127, 64
"""Largest code of a weight. Two products of 255 and 64 fit into 16 bits, of 255 and 127 they do not."""
LEVELS = 255
"""Steps between the lowest and the highest activation."""

Range = tuple[float, float]
"""The lowest and the highest value of a tensor."""


def prepare(model: onnx.ModelProto) -> None:
    """Make every product that can be quantized one that `products_of` finds; InputError if there is none."""
    split_gemm(model.graph)
    refuse_halves(model.graph)
    if not products_of(model.graph):
        raise InputError("the graph has no product with a constant float matrix", hint="is it already quantized?")


def quantize(
    model: onnx.ModelProto, ranges: Mapping[str, Range] | None, *, embeddings: bool, reduce_range: bool
) -> None:
    """Quantize `model`, as `prepare` left it, in place: with `ranges` of the products' inputs static, else dynamic.

    `embeddings`: also tables that are looked up, and a head tied to one, which then share one int8 table.
    """
    constants = constants_of(model.graph)
    graph = _Graph(model.graph, ranges, REDUCED_LIMIT if reduce_range else WEIGHT_LIMIT)
    for node in model.graph.node:
        name, table = matrix_of(node, constants)
        if name is None or (table and not embeddings):
            graph.nodes.append(node)
        elif node.op_type == "Gather":
            graph.gather(node, graph.weights(constants[name], 0))
        else:
            graph.product(node, graph.weights(constants[name], 0 if table else 1), table)
    put(model, graph.nodes)
    if ranges is not None:
        _subtract_biases(model)


def round_weights(matrix: np.ndarray, axis: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 of `matrix` and a float32 scale for each place along `axis`; the zero point is 0."""
    scales = np.abs(matrix).max(axis=1 - axis).astype(np.float32) / np.float32(limit)
    scales[scales < np.finfo(np.float32).tiny] = 1
    codes = np.clip(np.rint(matrix / np.expand_dims(scales, 1 - axis)), -limit, limit)
    return codes.astype(np.int8), scales


def scale_of(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of activations from `low` to `high`; 0 is always among them and is exact.

    A tensor that held nothing but zeros gets scale 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / LEVELS)
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1), np.uint8(0)
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, LEVELS))


def _subtract_biases(model: onnx.ModelProto) -> None:
    """Subtract what was a product's bias with its sign turned, which is the same number.

    Of a MatMul and an Add of two dimensions ONNX Runtime (1.31) makes a Gemm before it looks for integers, and then
    multiplies floats.
    """
    constants = constants_of(model.graph)
    same = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Identity"}
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}
    for node in model.graph.node:
        biases = [name for name in (same.get(name, name) for name in node.input) if name in constants]
        if node.op_type != "Add" or len(biases) != 1 or not products.intersection(node.input):
            continue
        negative = f"{biases[0]}_negative"
        if negative not in constants:
            array = -numpy_helper.to_array(constants[biases[0]])
            constants[negative] = numpy_helper.from_array(array, negative)
            model.graph.initializer.append(constants[negative])
        inputs = [*products.intersection(node.input), negative]
        node.op_type = "Sub"
        del node.input[:]
        node.input.extend(inputs)
    put(model, list(model.graph.node))


class _Graph:
    """Nodes of the quantized graph, in order, and the constants that they need."""

    def __init__(self, graph: onnx.GraphProto, ranges: Mapping[str, Range] | None, limit: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph, self._ranges, self._limit = graph, ranges, limit
        self._done: set[str] = set()

    def weights(self, tensor: onnx.TensorProto, axis: int) -> tuple[str, str]:
        """Names of the codes and the scales of a matrix, whose output channels lie along `axis`."""
        name = f"{tensor.name}_rows" if axis == 0 else tensor.name  # one matrix may be read as a table and as a factor
        codes, scales = f"{name}_int8", f"{name}_scale"
        if codes not in self._done:
            self._done.add(codes)
            values = round_weights(numpy_helper.to_array(tensor), axis, self._limit)
            for part, array in zip((codes, scales), values, strict=True):
                self._graph.initializer.append(numpy_helper.from_array(array, part))
        return codes, scales

    def gather(self, node: onnx.NodeProto, weights: tuple[str, str]) -> None:
        """Rows of a table times their scales."""
        out, (codes, scales) = node.output[0], weights
        self._constant("last_axis", np.array([-1], np.int64))
        self._add("Gather", [codes, node.input[1]], f"{out}_int8", axis=0)
        self._add("Cast", [f"{out}_int8"], f"{out}_float", to=TensorProto.FLOAT)
        self._add("Gather", [scales, node.input[1]], f"{out}_scales", axis=0)
        self._add("Unsqueeze", [f"{out}_scales", "last_axis"], f"{out}_scale_columns")
        self._add("Mul", [f"{out}_float", f"{out}_scale_columns"], out)

    def product(self, node: onnx.NodeProto, weights: tuple[str, str], table: bool) -> None:
        """A product with integer operators; `table`: its matrix is stored as `(N, K)`."""
        codes, scales = weights
        if table:  # of a constant: done once, when a session is opened
            if f"{codes}_columns" not in self._done:
                self._done.add(f"{codes}_columns")
                self._add("Transpose", [codes], f"{codes}_columns", perm=[1, 0])
            codes = f"{codes}_columns"
        build = self._dynamic if self._ranges is None else self._static
        build(node.input[0], codes, scales, node.output[0])

    def _dynamic(self, x: str, codes: str, scales: str, out: str) -> None:
        parts = [f"{x}_uint8", f"{x}_scale", f"{x}_zero_point"]
        if parts[0] not in self._done:
            self._done.add(parts[0])
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], parts, name=parts[0]))
        self._add("MatMulInteger", [parts[0], codes, parts[2]], f"{out}_int32")
        self._add("Cast", [f"{out}_int32"], f"{out}_float", to=TensorProto.FLOAT)
        self._add("Mul", [parts[1], scales], f"{out}_scale")
        self._add("Mul", [f"{out}_float", f"{out}_scale"], out)

    def _static(self, x: str, codes: str, scales: str, out: str) -> None:
        assert self._ranges is not None
        parts = [f"{x}_uint8", f"{x}_scale", f"{x}_zero_point"]
        if parts[0] not in self._done:
            self._done.add(parts[0])
            for name, value in zip(parts[1:], scale_of(*self._ranges[x]), strict=True):
                self._constant(name, np.array(value))
            self._add("QuantizeLinear", [x, *parts[1:]], parts[0])
        # One for each product: ONNX Runtime takes it and the product together.
        self._add("DequantizeLinear", parts, f"{out}_input")
        self._add("DequantizeLinear", [codes, scales], f"{out}_weight", axis=1)
        self._add("MatMul", [f"{out}_input", f"{out}_weight"], out)

    def _constant(self, name: str, value: np.ndarray) -> None:
        if name not in self._done:
            self._done.add(name)
            self._graph.initializer.append(numpy_helper.from_array(value, name))

    def _add(self, operator: str, inputs: list[str], out: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [out], name=f"{out}_{operator}", **attributes))
