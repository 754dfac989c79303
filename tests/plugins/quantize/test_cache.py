"""Keys and values in int8: the operator against numpy, the stage's scales, and the engine on such a bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
helper, numpy_helper, kinds = onnx.helper, onnx.numpy_helper, onnx.TensorProto

# -- the operator -----------------------------------------------------------------------------------------------------


def operator(heads: int, kv: int, width: int, scales: tuple[np.ndarray, np.ndarray], **attributes: Any) -> Any:
    """A graph of one GroupQueryAttention with an int8 cache, and a bias if `bias` is among the attributes."""
    biased = attributes.pop("bias")
    names = ["q", "k", "v", "past_k", "past_v", "last", "total", "", "", "", "bias" if biased else "", "", "ks", "vs"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
        **attributes,
    )
    value, cache = helper.make_tensor_value_info, [None, kv, None, width]
    inputs = [value(n, kinds.FLOAT, [None, None, h * width]) for n, h in (("q", heads), ("k", kv), ("v", kv))]
    inputs += [value(name, kinds.INT8, cache) for name in ("past_k", "past_v")]
    inputs += [value("last", kinds.INT32, [None]), value("total", kinds.INT32, [1])]
    inputs += [value("bias", kinds.FLOAT, [None, heads, None, None])] if biased else []
    outputs = [value("out", kinds.FLOAT, [None, None, heads * width])]
    outputs += [value(name, kinds.INT8, cache) for name in ("present_k", "present_v")]
    stored = [numpy_helper.from_array(array, name) for array, name in zip(scales, ("ks", "vs"), strict=True)]
    graph = helper.make_graph([node], "attention", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def attention(q, keys, values, past, scale, window, softcap, bias):
    """One row in float64: `q (S, H, d)`, `keys, values (KV, T, d)` dequantized, `bias (H, S, T)`; `(S, H, d)`."""
    group = q.shape[1] // keys.shape[0]
    scores = np.einsum("shd,htd->hst", q, keys.repeat(group, 0)) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    at, seen = past + np.arange(len(q))[:, None], np.arange(keys.shape[1])
    hidden = (seen > at) | ((seen <= at - window) if window > 0 else False)
    scores = np.where(hidden, -np.inf, scores + bias)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hst,htd->shd", weights, values.repeat(group, 0))


@pytest.mark.parametrize(
    "extra", [{}, {"window": 7}, {"softcap": 5.0}, {"bias": True}], ids=["plain", "window", "softcap", "bias"]
)
@pytest.mark.parametrize(("lengths", "new"), [((0,), 5), ((0,), 300), ((20,), 3), ((600,), 64), ((40, 3, 700), 1)])
@pytest.mark.parametrize("shape", [(4, 2, 8), (9, 3, 64)], ids=["narrow", "wide"])
def test_the_operator_is_attention_over_rounded_keys_and_values(shape, lengths, new, extra) -> None:
    """What ONNX Runtime's CPU kernel computes, in place, for a prompt, tokens on top of a past, and a ragged step."""
    heads, kv, width = shape
    window, softcap, biased = extra.get("window", -1), extra.get("softcap", 0.0), extra.get("bias", False)
    random = np.random.default_rng(sum(lengths) + new)
    scales = tuple(random.uniform(0.01, 0.03, kv * width).astype(np.float32) for _ in "kv")
    attributes = {"scale": 0.3, "softcap": softcap, "local_window_size": window, "bias": biased}
    session = operator(heads, kv, width, scales, **attributes)
    rows, total = len(lengths), max(lengths) + new
    buffers = [random.integers(-127, 128, (rows, kv, total + 9, width)).astype(np.int8) for _ in "kv"]
    before = [buffer.copy() for buffer in buffers]
    q, k, v = (random.standard_normal((rows, new, n * width)).astype(np.float32) for n in (heads, kv, kv))
    bias = random.standard_normal((rows, heads, new, total)).astype(np.float32) if biased else np.zeros((rows, 1, 1, 1))
    last = np.array([length + new - 1 for length in lengths], np.int32)
    feeds = {"q": q, "k": k, "v": v, "last": last, "total": np.array([total], np.int32)}
    binding = session.io_binding()
    for name, array in {**feeds, **({"bias": bias} if biased else {})}.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("out", "cpu")
    for name, buffer in zip("kv", buffers, strict=True):
        held = ort.OrtValue.ortvalue_from_numpy(buffer)
        binding.bind_ortvalue_input(f"past_{name}", held)
        binding.bind_ortvalue_output(f"present_{name}", held)
    session.run_with_iobinding(binding)
    out = binding.get_outputs()[0].numpy().reshape(rows, new, heads, width)
    for row, past in enumerate(lengths):
        end, floats = past + new, []
        for given, scale, buffer, old in zip((k, v), scales, buffers, before, strict=True):
            scale = scale.reshape(kv, 1, width)
            codes = np.clip(np.rint(given[row].reshape(new, kv, width).transpose(1, 0, 2) / scale), -128, 127)
            wrong = np.abs(buffer[row, :, past:end] - codes)
            assert wrong.max() <= 1, "a tie may be rounded the other way"
            assert wrong.mean() < 1e-4
            assert np.array_equal(buffer[row, :, :past], old[row, :, :past]), "what was there stays"
            assert np.array_equal(buffer[row, :, end:], old[row, :, end:])
            floats.append(buffer[row, :, :end] * scale.astype(np.float64))
        query = q[row].reshape(new, heads, width).astype(np.float64)
        expected = attention(query, *floats, past, 0.3, window, softcap, bias[row, :, :, :end])
        assert np.abs(out[row] - expected).max() < 5e-6
