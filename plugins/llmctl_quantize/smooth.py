"""SmoothQuant (2211.10438): what is hard to round in activations is moved to the weights, before either is rounded.

Channel `j` of a product's input is divided by `s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)` and row `j` of the
weights multiplied by it, which changes nothing in exact arithmetic. The division is put into the norm before the
product; products behind anything else, attention or an activation function, stay as they are, as in the paper.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper

from llmctl.errors import InputError
from llmctl_quantize.matrices import NORMS, constants_of, products_of

Channels = dict[str, tuple[np.ndarray, np.ndarray]]
"""Of each tensor the lowest and the highest value of every channel."""
_SMALLEST = 1e-5
_SKIPPING = 2
"""Place of a norm's weight and, behind it, its bias, among the inputs of one that adds what skipped a layer."""


def migrate(model: onnx.ModelProto, channels: Channels, alpha: float) -> Channels:
    """Move part of the activations' ranges to the weights of `model`, in place; the ranges that are left.

    InputError if no product reads a norm.
    """
    graph, left = model.graph, dict(channels)
    constants = constants_of(graph)
    norms = {node.output[0]: node for node in graph.node if node.op_type in NORMS}
    read: dict[str, list[tuple[str, bool]]] = {}
    for node, name, table in products_of(graph):
        read.setdefault(node.input[0], []).append((name, table))
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    done = 0
    for x, matrices in read.items():
        alone = readers[x] == len(matrices) and all(readers[name] == 1 and not table for name, table in matrices)
        if not (alone and x in norms and set(_own(norms[x])) <= set(constants)):
            continue
        arrays = {name: numpy_helper.to_array(constants[name]) for name, _ in matrices}
        weight = np.max([np.abs(array).max(axis=1) for array in arrays.values()], axis=0)
        factor = factors(np.maximum(-channels[x][0], channels[x][1]), weight, alpha)
        for name, array in arrays.items():
            constants[name].CopyFrom(numpy_helper.from_array(array * factor[:, None], name))
        _divide(graph, constants, norms[x], factor)
        left[x] = channels[x][0] / factor, channels[x][1] / factor
        done += 1
    if not done:
        raise InputError(
            "no product reads a norm alone, so there is nothing to put its factors into",
            hint="leave `smooth` out",
        )
    return left


def factors(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """`s (K,)` float32 from the largest magnitudes of each channel in the activations and in the weights, `(K,)`."""
    found = np.maximum(activations, _SMALLEST) ** alpha / np.maximum(weights, _SMALLEST) ** (1 - alpha)
    return np.where((activations > 0) & (weights > 0), found, 1).astype(np.float32)


def _own(norm: onnx.NodeProto) -> list[str]:
    """Names of the weight and, where there is one, the bias by which `norm` ends."""
    first = _SKIPPING if norm.op_type.startswith("Skip") else 1
    biased = norm.op_type in ("LayerNormalization", "SkipLayerNormalization")
    return [name for name in norm.input[first : first + 1 + biased] if name]


def _divide(
    graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto], norm: onnx.NodeProto, factor: np.ndarray
) -> None:
    """Divide what `norm` gives: its weight and bias get copies of their own, as norms may share theirs."""
    for old in _own(norm):
        name = f"{norm.output[0]}_{old}_smoothed"
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(constants[old]) / factor, name))
        norm.input[list(norm.input).index(old)] = name
