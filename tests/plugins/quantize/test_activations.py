"""Integer products against the ONNX specification in numpy, torch and ONNX Runtime's tools; ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from llmctl import Artifact, InputError
from llmctl_quantize import activations, ranges, saturation

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
helper, numpy_helper, kinds = onnx.helper, onnx.numpy_helper, onnx.TensorProto

# -- products by the specification ------------------------------------------------------------------------------------

INNER, HIDDEN, OUTER = 48, 64, 24


def layers(*matrices: np.ndarray) -> Any:
    """A graph of products with a Relu between two."""
    nodes, x = [], "x"
    for i, _ in enumerate(matrices):
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"y{i}"], name=f"product{i}"))
        x = f"h{i}"
        if i + 1 < len(matrices):
            nodes.append(helper.make_node("Relu", [f"y{i}"], [x], name=f"relu{i}"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "layers",
        [value("x", kinds.FLOAT, [None, matrices[0].shape[0]])],
        [value(f"y{len(matrices) - 1}", kinds.FLOAT, [None, matrices[-1].shape[1]])],
        [numpy_helper.from_array(matrix, f"w{i}") for i, matrix in enumerate(matrices)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def matrices(seed: int, *shapes: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(shape[0])) for shape in shapes]


def quantized(model: Any, found: dict[str, tuple[float, float]] | None, reduce_range: bool = False) -> Any:
    activations.prepare(model)
    activations.quantize(model, found, embeddings=True, reduce_range=reduce_range)
    return model


def run(model: Any, x: np.ndarray, *more: str) -> list[np.ndarray]:
    """The outputs of a graph and the tensors `more`, with all that ONNX Runtime fuses unless `more` are asked for."""
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})
    del model.graph.output[1:]
    return found


def constants(model: Any) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def dynamic_codes(x: np.ndarray) -> tuple[np.ndarray, np.float32, np.uint8]:
    """DynamicQuantizeLinear of the ONNX specification."""
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero = np.rint(np.clip(0 - low / scale, 0, 255)).astype(np.uint8)
    return linear_codes(x, scale, zero), scale, zero


def linear_codes(x: np.ndarray, scale: np.float32, zero: np.uint8) -> np.ndarray:
    """QuantizeLinear of the ONNX specification: half to even, saturated."""
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8)


def product(codes: np.ndarray, zero: np.uint8, scale: np.float32, weights: np.ndarray, scales: np.ndarray) -> Any:
    """What integers say, and the step of each output: one in the sum."""
    sums = (codes.astype(np.int64) - zero) @ weights.astype(np.int64)
    step = scale.astype(np.float64) * scales
    return sums * step, step


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_product_is_what_the_specification_says_to_one_step(static: bool, rows: int) -> None:
    (w,) = matrices(0, (INNER, OUTER))
    x = np.random.default_rng(rows).normal(0.4, 2, size=(rows, INNER)).astype(np.float32)
    model = quantized(layers(w), {"x": (-5.0, 4.0)} if static else None)
    held = constants(model)
    assert held["w0_int8"].dtype == np.int8
    assert np.abs(held["w0_int8"]).max(axis=0).tolist() == [127] * OUTER, "every output channel has its own scale"
    assert np.abs(held["w0_int8"] * held["w0_scale"] - w).max() <= held["w0_scale"].max() / 2 * (1 + 1e-6)
    if static:
        scale, zero = held["x_scale"], held["x_zero_point"]
        codes = linear_codes(x, scale, zero)
        assert 0 in codes or 255 in codes or rows == 1, "what is outside the range is cut off"
    else:
        codes, scale, zero = dynamic_codes(x)
    found = run(model, x, "x_uint8")[1]
    assert np.abs(found.astype(int) - codes).max() <= 1, "a tie may be rounded the other way"
    expected, step = product(found, zero, scale, held["w0_int8"], held["w0_scale"])
    assert (np.abs(run(model, x)[0] - expected) / step).max() < 0.1, "sums of integers are exact"
    assert (np.abs(expected - product(codes, zero, scale, held["w0_int8"], held["w0_scale"])[0]) <= 127 * step).all()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_two_layers_are_what_the_specification_says(static: bool) -> None:
    """Rounded again between the products, each to one step of its own."""
    given = matrices(1, (INNER, HIDDEN), (HIDDEN, OUTER))
    x = np.random.default_rng(7).normal(size=(9, INNER)).astype(np.float32)
    hidden = np.maximum(x @ given[0], 0)
    limits = {"x": (float(x.min()), float(x.max())), "h0": (0.0, float(hidden.max()))}
    model = quantized(layers(*given), limits if static else None)
    held, values = constants(model), x
    for i, name in enumerate(("x", "h0")):
        if static:
            scale, zero = held[f"{name}_scale"], held[f"{name}_zero_point"]
            codes = linear_codes(values, scale, zero)
        else:
            codes, scale, zero = dynamic_codes(values)
        expected, step = product(codes, zero, scale, held[f"w{i}_int8"], held[f"w{i}_scale"])
        values = np.maximum(expected, 0).astype(np.float32)
    found = run(model, x)[0]
    assert (np.abs(found - expected) / step).max() < 128, "one code of one hidden number, times the largest weight"
    assert (np.abs(found - expected) / step < 1).mean() > 0.99


def test_static_products_equal_torchs_fake_quantization() -> None:
    given = matrices(2, (INNER, OUTER))
    x = np.random.default_rng(3).normal(size=(32, INNER)).astype(np.float32)
    model = quantized(layers(*given), {"x": (-2.0, 3.0)})
    held = constants(model)
    scale, zero = float(held["x_scale"]), int(held["x_zero_point"])
    faked = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x), scale, zero, 0, 255)
    scales, zeros = torch.from_numpy(held["w0_scale"].copy()), torch.zeros(OUTER, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(torch.from_numpy(given[0]), scales, zeros, 1, -127, 127)
    expected = (faked.double() @ weight.double()).numpy()
    step = held["x_scale"] * held["w0_scale"]
    assert (np.abs(run(model, x)[0] - expected) / step).max() < 1
    exact = x.astype(np.float64) @ given[0]
    assert (np.abs(exact - expected) / step).max() > 100, "rounding does something"


def test_onnx_runtimes_tools_round_the_same_way(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    given = matrices(4, (INNER, HIDDEN), (HIDDEN, OUTER))
    x = np.random.default_rng(5).normal(size=(20, INNER)).astype(np.float32)
    onnx.save(layers(*given), tmp_path / "float.onnx")
    common = {"per_channel": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", **common)
    theirs = onnx.load(tmp_path / "dynamic.onnx")
    assert np.array_equal(run(theirs, x)[0], run(quantized(layers(*given), None), x)[0])

    class Once(CalibrationDataReader):
        left = iter([{"x": x}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    unsigned = {"activation_type": QuantType.QUInt8, **common}
    quantize_static(tmp_path / "float.onnx", tmp_path / "static.onnx", Once(), **unsigned)
    held = constants(onnx.load(tmp_path / "static.onnx"))
    ours = constants(quantized(layers(*given), {"x": (float(x.min()), float(x.max())), "h0": (0.0, 1.0)}))
    for name, same in (("x_scale", "x_scale"), ("x_zero_point", "x_zero_point"), ("w0_quantized", "w0_int8")):
        assert np.array_equal(held[name], ours[same]), name
    assert held["w0_scale"] == pytest.approx(ours["w0_scale"], rel=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (-1.0, 1.55, 0.01, 100),
        (0.5, 2.55, 0.01, 0),  # 0 is always among them
        (-2.55, -1.0, 0.01, 255),
        (0.0, 0.0, 1.0, 0),  # nothing was seen
        (2.55, 2.55, 0.01, 0),  # always the same
        (0.0, 1e-45, 1.0, 0),  # no scale is so small
    ],
)
def test_zero_is_exact_whatever_the_range(low: float, high: float, scale: float, zero: int) -> None:
    found = activations.scale_of(low, high)
    assert found == (pytest.approx(scale, rel=1e-6), zero)
    assert (linear_codes(np.float32(0), *found) - found[1]) * found[0] == 0


def test_a_channel_of_zeros_stays_zero() -> None:
    codes, scales = activations.round_weights(np.array([[0.0, 2.0], [0.0, -1.0]], np.float32), 1, 127)
    assert codes.tolist() == [[0, 127], [0, -64]]
    assert scales.tolist() == [1, pytest.approx(2 / 127)]


def test_a_matrix_that_is_table_and_factor_is_rounded_for_each() -> None:
    (w,) = matrices(6, (INNER, INNER))
    model = layers(w)
    model.graph.node.insert(0, helper.make_node("Gather", ["w0", "ids"], ["looked_up"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, 5]), "ids"))
    model.graph.output.append(helper.make_tensor_value_info("looked_up", kinds.FLOAT, [2, INNER]))
    x = np.random.default_rng(8).normal(size=(4, INNER)).astype(np.float32)
    session = ort.InferenceSession(quantized(model, None).SerializeToString(), providers=["CPUExecutionProvider"])
    product_, rows = session.run(None, {"x": x})
    assert np.abs(rows - w[[3, 5]]).max() <= np.abs(w[[3, 5]]).max() / 127
    assert np.abs(product_ - x @ w).max() < 0.1


def saturated(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums as `vpmaddubsw` makes them: two products each are added in 16 bits, and cut off."""
    pairs = np.einsum("rpk,pkn->rpn", codes.reshape(len(codes), -1, 2), weights.reshape(-1, 2, weights.shape[1]))
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)


def test_a_reduced_range_is_exact_without_vnni_and_a_full_one_is_not() -> None:
    w = np.ones((INNER, OUTER), np.float32)
    codes = np.full((2, INNER), 255, np.int64)
    for reduce_range, limit in ((True, 64), (False, 127)):
        held = constants(quantized(layers(w), None, reduce_range))["w0_int8"].astype(np.int64)
        assert held.max() == limit
        assert np.array_equal(saturated(codes, held), codes @ held) is reduce_range
    assert saturation.exact(64)


# -- ranges -----------------------------------------------------------------------------------------------------------


def test_percentiles_are_numpys_to_a_bin() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=200_000) - 1
    low, high = float(values.min()), float(values.max())
    counts = np.histogram(values, ranges.BINS, (low, high))[0]
    width = (high - low) / ranges.BINS
    for percentile in (99.99, 99.0, 90.0):
        outside = (100 - percentile) / 2
        expected = np.percentile(values, [outside, 100 - outside])
        assert np.abs(np.array(ranges.quantiles(counts, low, high, percentile)) - expected).max() <= width
    assert ranges.quantiles(counts, low, high, 100.0) == (pytest.approx(low), pytest.approx(high))
    assert ranges.quantiles(np.zeros(ranges.BINS, np.int64), 0.0, 0.0, 99.0) == (0.0, 0.0)


def test_entropy_is_scipys_and_clips_outliers() -> None:
    from scipy import stats

    random = np.random.default_rng(1)
    values = np.abs(np.concatenate([random.normal(size=100_000), [40.0]]))
    counts = np.histogram(values, ranges.BINS, (0, 40.0))[0]
    for size in (128, 300, 1024, 2048):
        kept, level = counts[:size].astype(float), np.arange(size) * 128 // size
        reference, spread = kept.copy(), np.zeros(size)
        reference[-1] += counts[size:].sum()
        for i in range(128):
            inside = (level == i) & (kept > 0)
            spread[inside] = kept[level == i].sum() / max(inside.sum(), 1)
        # scipy knows that nothing is held where clipped values would be.
        assert ranges.divergence(counts, size) == pytest.approx(stats.entropy(reference, spread), rel=1e-9)
    low, high = ranges.entropy(counts, -40.0, 3.0)
    assert 2.5 < -low < 6, "nearly all of a normal distribution, and not the outlier"
    assert high == 3.0
    assert ranges.entropy(np.zeros(ranges.BINS, np.int64), 0.0, 0.0) == (0.0, 0.0)


def test_ranges_are_what_torch_sees(trained: Artifact, bundle: Artifact, tmp_path: Path) -> None:
    """Of every product that reads an activation function, by hooks on the model."""
    from llmctl.nn.hf import load_model

    model, seen = load_model(trained.path).eval(), {}
    for i, block in enumerate(model.blocks):
        block.ffn.down.register_forward_pre_hook(
            lambda _, given, i=i: seen.setdefault(i, []).append(given[0].detach().numpy().reshape(-1, 160))
        )
    texts = [list(range(6, 90)), list(range(90, 30, -1))]
    with torch.inference_mode():
        for ids in texts:
            model(torch.tensor([ids]))
    graph = onnx.load(bundle / "model.onnx")
    activations.prepare(graph)
    told: list[tuple[int, int]] = []
    found = ranges.read(graph, texts, tmp_path, 1, lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert not list(tmp_path.iterdir())
    inputs = {node.input[1]: node.input[0] for node in graph.graph.node if node.op_type == "MatMul"}
    for i, parts in seen.items():
        low, high = found[inputs[f"blocks.{i}.ffn.down.weight"]]
        values = np.concatenate(parts)
        assert low == pytest.approx(values.min(axis=0), rel=1e-4, abs=1e-5)
        assert high == pytest.approx(values.max(axis=0), rel=1e-4, abs=1e-5)
    assert ranges.whole(found)[inputs["blocks.0.ffn.down.weight"]][1] == pytest.approx(
        np.concatenate(seen[0]).max(), rel=1e-4
    )


def test_clipping_leaves_out_the_outermost_values(bundle: Artifact, tmp_path: Path) -> None:
    graph = onnx.load(bundle / "model.onnx")
    activations.prepare(graph)
    pieces = [[7, 8, 9], [9, 30, 31, 32]]
    whole = ranges.whole(ranges.read(graph, pieces, tmp_path, 1, lambda *_: None))
    clipped = [
        ranges.clipped(graph, pieces, whole, "percentile", percentile, tmp_path, 1, lambda *_: None)
        for percentile in (100.0, 90.0)
    ]
    assert all(clipped[0][name] == pytest.approx(whole[name], rel=1e-5) for name in whole)
    assert all(clipped[1][name][0] > whole[name][0] and clipped[1][name][1] < whole[name][1] for name in whole)


def test_long_texts_are_read_in_pieces(bundle: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many tokens as memory has room for: what is seen is what the pieces alone show."""
    graph = onnx.load(bundle / "model.onnx")
    activations.prepare(graph)
    ids = list(range(10, 34))
    width = 2 * (96 + 96 + 96 + 160) + 96  # of all that products read
    apart = ranges.read(graph, [ids[start : start + 8] for start in (0, 8, 16)], tmp_path, 1, lambda *_: None)
    at_once = ranges.read(graph, [ids], tmp_path, 1, lambda *_: None)
    monkeypatch.setattr(ranges, "ACTIVATIONS", 8 * width + 1)
    found = ranges.read(graph, [ids], tmp_path, 1, lambda *_: None)
    for name in found:
        assert np.allclose(found[name], apart[name], atol=1e-5)
    assert any(not np.allclose(found[name], at_once[name], atol=1e-5) for name in found)


def test_numbers_that_are_not_finite_are_refused(bundle: Artifact, tmp_path: Path) -> None:
    graph = onnx.load(bundle / "model.onnx")
    activations.prepare(graph)
    for tensor in graph.graph.initializer:
        if tensor.name == "blocks.0.ffn.gate_up.weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(np.inf), tensor.name))
    with pytest.raises(InputError, match="holds numbers that are not finite"):
        ranges.read(graph, [[7, 8, 9]], tmp_path, 1, lambda *_: None)
