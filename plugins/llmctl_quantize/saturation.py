"""Whether integer products are exact on this processor.

x86 processors without VNNI add two products of uint8 and int8 in 16 bits, and what does not fit is cut off: a graph
then answers otherwise than elsewhere. Weights in 7 bits, `reduce_range`, always fit.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from llmctl_quantize.activations import LEVELS, WEIGHT_LIMIT

_INNER, _OUTER = 64, 32


def exact(limit: int = WEIGHT_LIMIT) -> bool:
    """Whether ONNX Runtime multiplies the largest activations and weights up to `limit` without loss here."""
    weights = np.full((_INNER, _OUTER), limit, np.int8)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "product",
        [value("x", TensorProto.UINT8, [None, _INNER])],
        [value("y", TensorProto.INT32, [None, _OUTER])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # One row and many may take different kernels.
    found = [session.run(None, {"x": np.full((rows, _INNER), LEVELS, np.uint8)})[0] for rows in (1, 16)]
    return all(bool((value == LEVELS * limit * _INNER).all()) for value in found)
