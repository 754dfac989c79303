"""A float32 graph in float16: weights, activations, inputs, outputs and cache, as `export-onnx` writes it.

Some numbers stay float32, between two Casts: angles of positions and what becomes a whole number, with all that they
are computed from, since float16 counts to 2048 only; and squares, roots, sums and means of norms that are spelled out,
which leave its range. Operators that have no float16 on a processor are ONNX Runtime's concern: it casts around them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llmctl.errors import InputError
from llmctl_quantize.matrices import attribute

LARGEST = 65504.0
"""The largest number of float16."""
BEYOND = 1e9
"""A single number of this size stands for infinity in a mask; it becomes the largest there is."""
WIDTH = 2.0**-10
"""Distance from 1 to the next number of float16."""
ROUNDINGS = 32
"""Roundings of the largest value by which an output may be off, as in the proof of `export-onnx`: thousands of them,
at random, add up like the root of their number."""

_EXACT = ("Cos", "Sin", "Floor", "Ceil", "Round", "Range")
_LARGE = ("Pow", "Sqrt", "Reciprocal", "Exp", "Log", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")
_NO_FLOATS = (
    *("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
    *("And", "Or", "Xor", "Not", "IsNaN", "IsInf"),
)
_TYPED_BY = {"Where": 1, "CastLike": 1, "OneHot": 2}
"""The input that has the type of the output; of all others it is the first."""
_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@dataclass
class Halved:
    """What rounding did to the weights."""

    weights: int = 0
    """Numbers that are not 0."""
    zeroed: int = 0
    """Those of them that are too small for float16 and became 0."""

    @property
    def share(self) -> float:
        """Of the weights that became 0."""
        return self.zeroed / max(1, self.weights)


@dataclass
class _Plan:
    """Who reads and makes which float values in which width."""

    graph: onnx.GraphProto
    floats: set[str]
    wide: set[int] = field(default_factory=set)
    """Places of the nodes that stay float32."""

    def read(self, *, wide: bool) -> set[str]:
        """The float values that these nodes read; float16 is also what the graph gives."""
        chosen = (node for place, node in enumerate(self.graph.node) if (place in self.wide) is wide)
        names = {name for node in chosen for name in node.input}
        return self.floats & (names if wide else names | {out.name for out in self.graph.output})


def halve(model: onnx.ModelProto) -> Halved:
    """Rewrite `model`, whose weights are in memory, in place.

    InputError for a graph that is no float32 one, and for a weight that float16 cannot hold: none becomes infinite.
    """
    graph = model.graph
    _refuse(model)
    _lift_constants(graph)
    plan = _Plan(graph, _floats(graph))
    plan.wide = _wide(plan)
    halves, wholes = plan.read(wide=False), plan.read(wide=True)
    given = {value.name for value in graph.input}
    made = {tensor.name for tensor in graph.initializer} - given
    # What only float32 nodes read keeps its name.
    names = {name: name if name in made - halves else f"{name}_float32" for name in wholes}
    found = _store(graph, halves | given, names)
    _rewrite(plan, halves, names)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _FLOAT:
            value.type.tensor_type.elem_type = _HALF
    del graph.value_info[:]
    return found


def rounded(name: str, array: np.ndarray) -> np.ndarray:
    """In float16; InputError for a finite number that it cannot hold."""
    if array.size == 1 and np.isfinite(array).all() and np.abs(array).max() >= BEYOND:
        array = np.clip(array, -LARGEST, LARGEST)
    with np.errstate(over="ignore"):
        found = array.astype(np.float16)
    lost = np.isinf(found) & np.isfinite(array)
    if lost.any():
        raise InputError(
            f"`{name}` holds {array[lost][0]:.8g}, and the largest number of float16 is {LARGEST:.0f}",
            hint="`bits: 8` holds it, with scales in float32",
        )
    return found


def excess(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a multiple of what the roundings of float16 explain; above 1 is too much, or NaN."""
    bound = ROUNDINGS * WIDTH * max(1.0, float(np.abs(expected).max(initial=0.0)))
    return float(np.abs(found.astype(np.float32) - expected).max(initial=0.0)) / bound


def _refuse(model: onnx.ModelProto) -> None:
    graph = model.graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    if kinds & {_HALF, TensorProto.BFLOAT16}:
        raise InputError("the graph is in half precision already", hint="`bits: 16` starts from a float32 bundle")
    quantized = {node.op_type for node in graph.node if "Quantize" in node.op_type or "NBits" in node.op_type}
    quantized |= {node.op_type for node in graph.node if "Integer" in node.op_type}
    kinds |= {value.type.tensor_type.elem_type for value in graph.input}
    if quantized or kinds & {TensorProto.INT8, TensorProto.UINT8}:
        raise InputError(
            f"the graph is quantized already ({', '.join(sorted(quantized)) or 'an int8 cache'})",
            hint="`bits: 16` starts from a float32 bundle, as `export-onnx` makes it",
        )
    if model.functions or any(item.HasField("g") or item.graphs for node in graph.node for item in node.attribute):
        raise InputError(
            "the graph has branches, loops or functions of its own, and `bits: 16` rewrites plain graphs",
            hint="export the model again with `export-onnx`",
        )
    if _FLOAT not in kinds:
        raise InputError("the graph has no float32 weights", hint="`bits: 16` starts from a float32 bundle")


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes of floats become stored tensors, which are rounded in one place."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Constant":
            given = node.attribute[0]
            value = helper.get_attribute_value(given)
            if given.name in ("value_float", "value_floats"):
                value = numpy_helper.from_array(np.array(value, np.float32))
            if isinstance(value, TensorProto) and value.data_type == _FLOAT:
                graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(value), node.output[0]))
                continue
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _floats(graph: onnx.GraphProto) -> set[str]:
    """Names of all float32 values. ONNX's own inference ends at operators of ONNX Runtime, so types are passed on."""
    found = {tensor.name for tensor in graph.initializer if tensor.data_type == _FLOAT}
    found |= {value.name for value in graph.input if value.type.tensor_type.elem_type == _FLOAT}
    for node in graph.node:
        if _gives_floats(node, found):
            outputs = node.output[:1] if node.op_type in ("TopK", "Dropout") else node.output
            found.update(name for name in outputs if name)
    return found


def _gives_floats(node: onnx.NodeProto, floats: set[str]) -> bool:
    if node.op_type in _NO_FLOATS:
        return False
    if node.op_type == "Cast":
        return bool(attribute(node, "to", 0) == _FLOAT)
    if node.op_type == "ConstantOfShape":
        value = attribute(node, "value", None)
        return value is None or value.data_type == _FLOAT
    place = _TYPED_BY.get(node.op_type, 0)
    return len(node.input) > place and node.input[place] in floats


def _wide(plan: _Plan) -> set[int]:
    """Places of the nodes that stay float32."""
    nodes = list(plan.graph.node)
    producer = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    exact = [place for place, node in enumerate(nodes) if _is_exact(node, plan.floats)]
    found: set[int] = set()
    while exact:
        place = exact.pop()
        if place not in found:
            found.add(place)
            exact += [producer[name] for name in nodes[place].input if name in plan.floats and name in producer]
    found |= {
        place for place, node in enumerate(nodes) if node.op_type in _LARGE and plan.floats.intersection(node.input)
    }
    return _with_between(plan, found, producer)


def _is_exact(node: onnx.NodeProto, floats: set[str]) -> bool:
    """Whether rounding what `node` reads would change whole numbers or angles."""
    to_whole = node.op_type == "Cast" and attribute(node, "to", 0) in (TensorProto.INT64, TensorProto.INT32)
    return (node.op_type in _EXACT or to_whole) and bool(floats.intersection(node.input))


def _with_between(plan: _Plan, wide: set[int], producer: dict[str, int]) -> set[int]:
    """And those between two of them, such as the epsilon that is added to a mean of squares before its root."""
    readers: dict[str, list[int]] = defaultdict(list)
    for place, node in enumerate(plan.graph.node):
        for name in node.input:
            readers[name].append(place)
    given = {out.name for out in plan.graph.output}
    while True:
        more = set()
        for place, node in enumerate(plan.graph.node):
            sources = [producer[name] for name in node.input if name in plan.floats and name in producer]
            ends = [end for name in node.output if name in plan.floats for end in readers[name]]
            inside = bool(sources) and bool(ends) and wide.issuperset([*sources, *ends])
            if place not in wide and inside and not given.intersection(node.output):
                more.add(place)
        if not more:
            return wide
        wide |= more


def _store(graph: onnx.GraphProto, halves: set[str], names: dict[str, str]) -> Halved:
    """Round the stored floats that `halves` names; those in `names` are kept in float32, too."""
    found, kept = Halved(), []
    for tensor in graph.initializer:
        if tensor.data_type != _FLOAT:
            continue
        array, name = numpy_helper.to_array(tensor), tensor.name
        if name in names and name in halves:
            kept.append(numpy_helper.from_array(array, names[name]))
        if name in halves:
            narrow = rounded(name, array)
            found.weights += int(np.count_nonzero(array))
            found.zeroed += int(np.count_nonzero(array) - np.count_nonzero(narrow))
            tensor.CopyFrom(numpy_helper.from_array(narrow, name))
    graph.initializer.extend(kept)
    return found


def _rewrite(plan: _Plan, halves: set[str], names: dict[str, str]) -> None:
    """Put each node into its width, and Casts where a value is read in another one than it is made in."""
    graph = plan.graph
    stored = {tensor.name for tensor in graph.initializer} - {value.name for value in graph.input}
    made = [_cast(value.name, names[value.name], _FLOAT) for value in graph.input if value.name in names]
    for place, node in enumerate(graph.node):
        casts: Iterable[onnx.NodeProto]
        floats = [name for name in node.output if name in plan.floats]
        if place in plan.wide:
            outputs = {name: names.get(name, f"{name}_float32") for name in floats}
            casts = [_cast(outputs[name], name, _HALF) for name in floats if name in halves]
            _rename(node, names, outputs)
        else:
            casts = [_cast(name, names[name], _FLOAT) for name in floats if name in names and name not in stored]
            _narrow(node)
        made += [node, *casts]
    made = [onnx.NodeProto.FromString(node.SerializeToString()) for node in made]
    del graph.node[:]
    graph.node.extend(made)


def _rename(node: onnx.NodeProto, inputs: dict[str, str], outputs: dict[str, str]) -> None:
    node.input[:] = [inputs.get(name, name) for name in node.input]
    node.output[:] = [outputs.get(name, name) for name in node.output]


def _narrow(node: onnx.NodeProto) -> None:
    """Have a node that says its type make float16."""
    for item in node.attribute:
        if node.op_type == "Cast" and item.name == "to" and item.i == _FLOAT:
            item.i = _HALF
        elif node.op_type == "ConstantOfShape" and item.t.data_type == _FLOAT:
            item.t.CopyFrom(numpy_helper.from_array(rounded(node.output[0], numpy_helper.to_array(item.t))))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", helper.make_tensor("value", _HALF, [1], [0.0])))


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=to)
