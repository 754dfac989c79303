"""Fewer, larger operators in a traced decoder, for decoding is bound by reading weights and by starting operators.

Three rewrites, each exact: the projections to queries, keys and values become one product, which GroupQueryAttention
takes packed; gate and up become one product that is split; a residual sum and the RMS norm after it become
SkipSimplifiedLayerNormalization, which gives the sum as well. Weights are joined along their output channels, so each
number is still stored once. `benchmarks/RESULTS.md` says what each of them brings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from llmctl_export_onnx.graph import MICROSOFT


def fuse(model: ir.Model) -> None:
    """Rewrite the decoder `model`, whose weights have their names, in place."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "GroupQueryAttention":
            _pack(graph, node)
    for node in list(graph):
        _join_pair(graph, node)
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _add_and_norm(graph, node)


def _pack(graph: ir.Graph, attention: ir.Node) -> None:
    """One product for queries, keys and values, where nothing but a bias stands between them and the operator."""
    found = [_projection(value) for value in attention.inputs[:3]]
    parts = [part for part in found if part is not None]
    if len(parts) < 3 or not _alike([product for product, _ in parts]):
        return
    products, biases = [product for product, _ in parts], [bias for _, bias in parts]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return
    out = _joined(graph, products, attention)
    given = [bias for bias in biases if bias is not None]
    if given:
        total = ir.node("Add", [out, _joined_weight(graph, given)])
        graph.insert_before(attention, total)
        out = total.outputs[0]
    sums = [value.producer() for value in attention.inputs[:3] if value is not None]
    for index, value in enumerate((out, None, None)):
        attention.replace_input_with(index, value)
    _remove(graph, [node for node in sums if node is not None and node not in products] + products)


def _join_pair(graph: ir.Graph, first: ir.Node) -> None:
    """One product for a pair that reads the same value into the same width: gate and up of a gated layer."""
    if first.op_type != "MatMul" or first.graph is None or first.inputs[0] is None:
        return
    readers = [node for node, index in first.inputs[0].uses() if node.op_type == "MatMul" and index == 0]
    if len(readers) != 2 or not _alike(readers) or len({_width(node) for node in readers}) != 1:
        return
    pair = sorted(readers, key=lambda node: str(node.inputs[1].name))  # type: ignore[union-attr]
    out = _joined(graph, pair, next(node for node in graph if node in readers))
    halves = ir.node("Split", [out], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    place = out.producer()
    assert place is not None
    graph.insert_after(place, halves)
    for node, half in zip(pair, halves.outputs, strict=True):
        _take_over(half, node.outputs[0])
    _remove(graph, pair)


def _add_and_norm(graph: ir.Graph, norm: ir.Node) -> None:
    """A residual sum and its norm in one operator, the sum being its fourth output."""
    total = norm.inputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or add.op_type != "Add" or norm.attributes.get_int("axis", -1) != -1:
        return
    gain = norm.inputs[1]
    if gain is None or not gain.is_initializer():
        return  # a gain that nodes make may come after the sum
    sides = list(add.inputs)
    if any(side is None or side.is_initializer() or not _same_shape(side, total) for side in sides):
        return
    if total.is_graph_output() or norm.outputs[0].is_graph_output():
        return  # its name is the graph's own
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*sides, gain],
        {"epsilon": epsilon},
        domain=MICROSOFT,
        num_outputs=4,
    )
    for unused in fused.outputs[1:3]:
        unused.name = ""
    graph.insert_after(add, fused)
    _take_over(fused.outputs[0], norm.outputs[0])
    _take_over(fused.outputs[3], add.outputs[0])
    _remove(graph, [norm, add])


def _projection(value: ir.Value | None) -> tuple[ir.Node, ir.Value | None] | None:
    """The product with a stored matrix that gives `value`, and the stored bias added to it; nobody else reads them."""
    node, bias = (value.producer() if value is not None else None), None
    if node is not None and node.op_type == "Add" and len(node.outputs[0].uses()) == 1:
        stored = [side for side in node.inputs if side is not None and side.is_initializer()]
        other = [side for side in node.inputs if side is not None and not side.is_initializer()]
        if len(stored) != 1 or len(other) != 1:
            return None
        bias, node = stored[0], other[0].producer()
        if bias.const_value is None or len(bias.const_value.shape) != 1:
            return None
    if node is None or node.op_type != "MatMul" or len(node.outputs[0].uses()) != 1:
        return None
    return node, bias


def _alike(products: Sequence[ir.Node]) -> bool:
    """Whether these are products of one value with stored matrices of their own."""
    weights = [node.inputs[1] for node in products]
    stored = all(
        weight is not None
        and weight.is_initializer()
        and weight.const_value is not None
        and len(weight.const_value.shape) == 2
        and len(weight.uses()) == 1
        for weight in weights
    )
    return (
        stored and len({id(node.inputs[0]) for node in products}) == 1 and len({id(w) for w in weights}) == len(weights)
    )


def _width(product: ir.Node) -> int:
    weight = product.inputs[1]
    assert weight is not None and weight.const_value is not None
    return int(weight.const_value.shape.numpy()[1])


def _joined(graph: ir.Graph, products: Sequence[ir.Node], before: ir.Node) -> ir.Value:
    """One product instead of several; they stay, without a reader of their weights."""
    weights = [node.inputs[1] for node in products]
    table = _joined_weight(graph, [weight for weight in weights if weight is not None])
    node = ir.node("MatMul", [products[0].inputs[0], table])
    graph.insert_before(before, node)
    source = products[0].outputs[0]
    out = node.outputs[0]
    if source.dtype is not None:
        out.dtype = source.dtype
    if source.shape is not None:
        out.shape = ir.Shape([*source.shape[:-1], sum(_width(product) for product in products)])
    return out


def _joined_weight(graph: ir.Graph, weights: Sequence[ir.Value]) -> ir.Value:
    """The weights side by side along their last axis, named after all of them."""
    name = joined_name([str(weight.name) for weight in weights])
    if name in graph.initializers:  # biases of zeros, which the tracer stores once for all layers
        return graph.initializers[name]
    arrays = [weight.const_value.numpy() for weight in weights if weight.const_value is not None]
    tensor = ir.tensor(np.ascontiguousarray(np.concatenate(arrays, axis=-1)), name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def joined_name(names: Sequence[str]) -> str:
    """`a.q.weight`, `a.k.weight`, `a.v.weight`: `a.qkv.weight`; `a.gate.weight`, `a.up.weight`: `a.gate_up.weight`."""
    parts = [name.split(".") for name in names]
    outside = {(*part[:-2], part[-1]) for part in parts}
    if len(outside) != 1 or min(map(len, parts)) < 2:
        return "+".join(names)
    own = [part[-2] for part in parts]
    joined = ("" if all(len(word) == 1 for word in own) else "_").join(own)
    return ".".join([*parts[0][:-2], joined, parts[0][-1]])


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether both are known to be of one shape; the operator adds other shapes differently than Add."""
    if a.shape is None or b.shape is None:
        return False
    named = all(isinstance(size, int) or size.value is not None for size in a.shape)
    return named and list(a.shape) == list(b.shape)


def _take_over(new: ir.Value, old: ir.Value) -> None:
    """Everyone who reads `old` reads `new`, which gets its type."""
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new)


def _remove(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Take the nodes out, and the stored tensors that only they read."""
    inputs = [value for node in nodes for value in node.inputs if value is not None]
    graph.remove(dict.fromkeys(nodes), safe=True)
    _forget(graph, inputs)


def _forget(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    for value in values:
        name = value.name
        if name is not None and value.is_initializer() and not value.uses() and name in graph.initializers:
            del graph.initializers[name]
