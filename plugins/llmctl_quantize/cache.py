"""An int8 cache of keys and values: how far they reach on real text, and the graph that stores them so.

ONNX Runtime's GroupQueryAttention rounds what it writes to its cache, `round(x / scale)` within -128 to 127, and
attends to `code * scale`, with a scale for each channel of each head (`k_quant_type: PER_CHANNEL`). Keys are rounded as
they are stored, turned to their positions; what a prompt reads of itself is rounded as what a later step reads of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llmctl.errors import InputError
from llmctl.ort import OrtGenerator
from llmctl.ort.cache import InPlaceRows
from llmctl.ort.generator import prefill

LARGEST = 127
"""The code of the largest value; -128 is left to what the text of the calibration did not show."""
_KEY_SCALE, _VALUE_SCALE = 12, 13
"""Places of the scales among the operator's inputs."""

Progress = Callable[[int, int], None]


def calibrate(generator: OrtGenerator, texts: Sequence[Sequence[int]], progress: Progress) -> dict[str, np.ndarray]:
    """The scales `(KV, d)` float32 of every cache tensor, by its input's name, from what reading `texts` leaves there.

    The texts are read once without an adapter and once with each, since all share these scales. A scale is the largest
    magnitude over 127. A channel of nothing but whole numbers up to 127 gets 1, which is exact: padding of narrow
    heads, and the tokens that some models keep in their cache. InputError for numbers that are not finite, and for
    whole ones that int8 cannot hold.
    """
    layout = generator.layout
    shape = (layout.kv_heads, layout.head_dim)
    largest = {name: np.zeros(shape, np.float32) for name in layout.past}
    whole = {name: np.ones(shape, bool) for name in layout.past}
    adapters = (None, *generator.adapter_names)
    for turn, adapter in enumerate(adapters):
        feeds = generator.with_adapter(adapter).adapter_feeds
        rows = InPlaceRows(generator.session, layout, 1, max(len(ids) for ids in texts), adapter=feeds)
        for done, ids in enumerate(texts):
            rows.restart()
            prefill(rows, 0, ids)
            for name, value in zip(layout.past, rows.cache, strict=True):
                values = value.numpy()[0, :, : len(ids)]
                np.maximum(largest[name], np.abs(values).max(axis=1), out=largest[name])
                whole[name] &= (values == np.rint(values)).all(axis=1)
            progress(turn * len(texts) + done + 1, len(adapters) * len(texts))
    return {name: _scales(name, largest[name], whole[name]) for name in layout.past}


def _scales(name: str, largest: np.ndarray, whole: np.ndarray) -> np.ndarray:
    if not np.isfinite(largest).all():
        raise InputError(f"`{name}` holds numbers that are not finite", hint="is the model damaged? `llmctl eval` it")
    if (whole & (largest > LARGEST)).any():
        raise InputError(
            f"`{name}` keeps whole numbers up to {largest[whole].max():.0f}, which int8 cannot",
            hint="export the model again: tokens are kept in digits that fit",
        )
    return np.where(whole, np.float32(1), largest / np.float32(LARGEST))


def quantize(model: onnx.ModelProto, scales: Mapping[str, np.ndarray]) -> None:
    """Make the caches of `model` int8, in place; `scales` as `calibrate` gives them."""
    graph = model.graph
    stored = set(scales)
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        inputs = [*node.input, *[""] * (_VALUE_SCALE + 1 - len(node.input))]
        for place, past in ((_KEY_SCALE, node.input[3]), (_VALUE_SCALE, node.input[4])):
            inputs[place] = f"{past}_scale"
            graph.initializer.append(numpy_helper.from_array(scales[past].reshape(-1), inputs[place]))
        stored |= set(node.output[1:3])
        del node.input[:]
        node.input.extend(inputs)
        node.attribute.extend(
            [
                helper.make_attribute("k_quant_type", "PER_CHANNEL"),
                helper.make_attribute("v_quant_type", "PER_CHANNEL"),
                helper.make_attribute("kv_cache_bit_width", 8),
            ]
        )
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name in stored:
            value.type.tensor_type.elem_type = TensorProto.INT8


def refuse(model: onnx.ModelProto, source: object) -> None:
    """InputError unless every cache tensor of `model` is one of floats that GroupQueryAttention alone reads."""
    pasts = {value.name: value for value in model.graph.input if value.name.startswith("past_key_values.")}
    readers: dict[str, list[str]] = {name: [] for name in pasts}
    for node in model.graph.node:
        for name in node.input:
            if name in readers:
                readers[name].append(node.op_type)
    problem = hint = ""
    kinds = {value.type.tensor_type.elem_type for value in pasts.values()}
    if not pasts or any(found != ["GroupQueryAttention"] for found in readers.values()):
        problem = "does not keep its cache in GroupQueryAttention, which alone can round it"
        hint = "export a decoder of our own architectures without Optimum, or leave `kv_cache_dtype` out"
    elif TensorProto.INT8 in kinds:
        problem, hint = "has an int8 cache already", "leave `kv_cache_dtype` out"
    elif kinds != {TensorProto.FLOAT}:
        problem = "computes in half precision, and the CPU's operator rounds float32 only"
        hint = "export the model again with `dtype: float32`"
    if problem:
        raise InputError(f"{source} {problem}", hint=hint)
