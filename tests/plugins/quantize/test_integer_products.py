"""The stage with `activations` dynamic or static: graph, size, quality, refusals, and the engine on such bundles."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from pydantic import ValidationError

from llmctl import Artifact, InputError, StageError
from llmctl.generator import Sampling
from llmctl.ort import open_bundle
from llmctl.testing import StageResult, run_stage
from llmctl_export_onnx import EXPORT_ONNX
from llmctl_quantize import QUANTIZE, activations, ranges, saturation, smooth
from llmctl_quantize.params import QuantizeParams

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
numpy_helper = onnx.numpy_helper

KINDS = ("dynamic", "static")
PRODUCTS = 2 * 6 + 1
"""Of the bundle: queries, keys and values apart, as heads of 24 are turned outside the operator; a tied head."""


def quantize(directory: Path, bundle: Artifact, data: Artifact | None = None, **params: Any) -> StageResult:
    return run_stage(QUANTIZE, directory, {"threads": 1, "speed_rounds": 1, **params}, model=bundle, data=data)


@pytest.fixture(scope="session")
def results(bundle: Artifact, tokens: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageResult]:
    return {kind: quantize(tmp_path_factory.mktemp(kind), bundle, tokens, activations=kind) for kind in KINDS}


def graph_of(result: StageResult) -> Any:
    return onnx.load(result.outputs["model"] / "model.onnx", load_external_data=False).graph


def optimised(result: StageResult, scratch: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(scratch / "optimised.onnx")
    options.log_severity_level = 3
    path = str(result.outputs["model"].path / "model.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(scratch / "optimised.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_is_of_integers(results: dict[str, StageResult], tmp_path: Path, kind: str) -> None:
    written = Counter(node.op_type for node in graph_of(results[kind]).node)
    run = optimised(results[kind], tmp_path)
    inputs = 2 * 4 + 1  # queries, keys and values read one tensor, which is rounded once
    if kind == "dynamic":
        assert written["MatMulInteger"] == PRODUCTS
        assert written["DynamicQuantizeLinear"] == inputs
        # What reads a tensor of its own takes the rounding with it.
        assert run["DynamicQuantizeMatMul"] == 2 * 3 + 1
        assert run["MatMulIntegerToFloat"] == 2 * 3
        assert written["MatMul"] == 0
    else:
        assert written["QuantizeLinear"] == inputs
        assert written["DequantizeLinear"] == 2 * PRODUCTS
        assert run["MatMulIntegerToFloat"] == PRODUCTS
        assert run["DequantizeLinear"] == 0
    assert run["MatMul"] == run["FusedMatMul"] == run["Gemm"] == written["FusedMatMul"] == 0
    assert written["Softmax"] == 0
    norms = {"RMSNormalization", "SkipSimplifiedLayerNormalization", "GroupQueryAttention"}
    original = Counter(node.op_type for node in onnx.load(results[kind].outputs["model"] / "model.onnx").graph.node)
    assert all(written[name] == original[name] for name in norms)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_as_small_as_the_quantized_share_says(
    results: dict[str, StageResult], bundle: Artifact, kind: str
) -> None:
    """A byte a weight and four a channel; what is below 1024 bytes stands in the graph's own file."""
    dim, ff, vocab, kv = 96, 160, 262, 48
    shapes = [(vocab, dim)] + 2 * [(dim, dim), (kv, dim), (kv, dim), (dim, dim), (2 * ff, dim), (dim, ff)]
    data = sum(n * k + (4 * n if 4 * n >= 1024 else 0) for n, k in shapes)
    path = results[kind].outputs["model"].path
    assert (path / "model.onnx.data").stat().st_size == data
    metrics = results[kind].metrics
    assert metrics["bytes"] == data + (path / "model.onnx").stat().st_size
    before = sum(4 * n * k for n, k in shapes)
    assert metrics["bytes.before"] == before + (bundle / "model.onnx").stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_quality_stays_within_the_budget(results: dict[str, StageResult], kind: str) -> None:
    assert 0.99 < results[kind].metrics["bits_per_byte.ratio"] < 1.01
    assert results[kind].metrics["top1_agreement"] > 0.95
    assert results[kind].outputs["model"].metadata["activations"] == kind
    assert results[kind].outputs["model"].metadata["bits"] == 8


def test_ranges_that_are_ten_times_too_small_exceed_the_budget(
    bundle: Artifact, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What calibration is for: on the wrong range the stage fails and leaves no bundle."""
    whole = ranges.whole
    monkeypatch.setattr(
        ranges, "whole", lambda channels: {k: (low / 10, high / 10) for k, (low, high) in whole(channels).items()}
    )
    with pytest.raises(
        StageError, match=r"8 bits with static activations raise bits per byte by .*%, the budget is"
    ) as e:
        quantize(tmp_path, bundle, tokens, activations="static")
    assert "try another `calibration`" in str(e.value.hint)
    assert not list(tmp_path.rglob("*.onnx*"))
    found = json.loads((tmp_path / "metrics" / "metrics.json").read_text())
    assert found["bits_per_byte.ratio"] > 1.05


def test_top_1_agreement_has_a_budget_of_its_own(bundle: Artifact, tokens: Artifact, tmp_path: Path) -> None:
    settings = {
        "activations": "static",
        "calibration": "percentile",
        "percentile": 97.0,
        "max_bits_per_byte_rise": 99.0,
    }
    assert quantize(tmp_path / "free", bundle, tokens, min_top1_agreement=0.0, **settings).metrics["top1_agreement"] < 1
    with pytest.raises(
        StageError, match=r"static activations leave top-1 agreement at .*%, at least 100\.00% is"
    ) as error:
        quantize(tmp_path / "strict", bundle, tokens, min_top1_agreement=1.0, **settings)
    assert "lower `min_top1_agreement`" in str(error.value.hint)
    assert not list((tmp_path / "strict").rglob("*.onnx*"))
    assert QuantizeParams(bits=4).agreement == 0, "as before"
    assert QuantizeParams(activations="dynamic").agreement == 0.9
    assert QuantizeParams(activations="dynamic", min_top1_agreement=0.5).agreement == 0.5


def graph_with_ranges(bundle: Artifact, tokens: Artifact, directory: Path, **params: Any) -> dict[str, float]:
    free = {"min_top1_agreement": 0.0, "max_bits_per_byte_rise": 10.0}
    result = quantize(directory, bundle, tokens, activations="static", **free, **params)
    model = onnx.load(result.outputs["model"] / "model.onnx")
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {node.input[0]: float(held[node.input[1]]) for node in model.graph.node if node.op_type == "QuantizeLinear"}


def test_how_ranges_are_taken(bundle: Artifact, tokens: Artifact, tmp_path: Path) -> None:
    """Clipped ones are finer; more text widens them; all are of the training split."""
    whole = graph_with_ranges(bundle, tokens, tmp_path / "minmax")
    middle = graph_with_ranges(bundle, tokens, tmp_path / "percentile", calibration="percentile")
    less = graph_with_ranges(bundle, tokens, tmp_path / "less", calibration="percentile", percentile=99.0)
    entropy = graph_with_ranges(bundle, tokens, tmp_path / "entropy", calibration="entropy")
    few = graph_with_ranges(bundle, tokens, tmp_path / "few", calibration_tokens=64)
    for name, scale in whole.items():
        assert less[name] <= middle[name] <= scale
        assert entropy[name] <= scale
        assert few[name] <= scale
    for clipped in (less, entropy, few):
        assert sum(clipped.values()) < 0.99 * sum(whole.values())
    assert sum(less.values()) < 0.95 * sum(middle.values())


def test_smoothing_changes_nothing_in_float(bundle: Artifact, tmp_path: Path) -> None:
    model = onnx.load(bundle / "model.onnx")
    activations.prepare(model)
    before = model.SerializeToString()
    texts = [np.random.default_rng(0).integers(6, 262, 90).tolist()]
    channels = ranges.read(model, texts, tmp_path, 1, lambda *_: None)
    left = smooth.migrate(model, channels, 0.5)
    changed = [name for name in channels if left[name][1] is not channels[name][1]]
    assert len(changed) == 2 * 2, "what queries, keys and values read, and what gate and up read"
    assert sum(node.op_type == "Mul" for node in model.graph.node) == sum(
        node.op_type == "Mul" for node in onnx.load(bundle / "model.onnx").graph.node
    ), "norms take the factors"
    again = ranges.read(model, texts, tmp_path, 1, lambda *_: None)
    for name in channels:
        assert again[name][1] == pytest.approx(left[name][1], rel=1e-3, abs=1e-4)
    logits = []
    for i, graph in enumerate((onnx.ModelProto.FromString(before), model)):
        directory = tmp_path / str(i)
        directory.mkdir()
        onnx.save(graph, directory / "model.onnx")
        for name in ("config.json", "generation_config.json", "genai_config.json"):
            (directory / name).write_bytes((bundle / name).read_bytes())
        logits.append(open_bundle(directory, "cpu", 1).logits(texts[0]))
    assert np.abs(logits[0] - logits[1]).max() / logits[0].std() < 1e-5
    assert not np.array_equal(*logits), "something was moved"


def rounding_error(x: np.ndarray, w: np.ndarray) -> float:
    """Relative error of a product of integers, per tensor in and per channel out."""
    scale, zero = activations.scale_of(float(x.min()), float(x.max()))
    codes = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    weights, scales = activations.round_weights(w, 1, 127)
    found, exact = codes @ weights.astype(float) * scale * scales, x.astype(float) @ w
    return float(np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean()))


def test_smoothing_is_best_between_its_ends() -> None:
    """The U of the paper's ablation, with an outlier channel sixty times as large as the others."""
    random = np.random.default_rng(0)
    x, w = random.normal(size=(256, 64)).astype(np.float32), random.normal(size=(64, 32)).astype(np.float32)
    x[:, 5] *= 60
    errors = {}
    for alpha in (0.0, 0.5, 1.0):
        s = smooth.factors(np.abs(x).max(axis=0), np.abs(w).max(axis=1), alpha)
        assert np.allclose((x / s) @ (w * s[:, None]), x @ w, rtol=1e-4, atol=1e-3)
        errors[alpha] = rounding_error(x / s, w * s[:, None])
    plain = rounding_error(x, w)
    assert errors[0.5] < 0.5 * min(plain, errors[0.0], errors[1.0])


def outliers(bundle: Artifact, directory: Path) -> Artifact:
    """The bundle with one channel of each norm 500 times as large, and the weights that read it as much smaller."""
    shutil.copytree(bundle.path, directory)
    model = onnx.load(bundle / "model.onnx")
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1].split(".")[-2] in ("q", "k", "v", "gate_up"):
            tensor = arrays[node.input[1]]
            array = numpy_helper.to_array(tensor).copy()
            array[7] /= 500
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for name in [name for name in arrays if name.endswith("norm.weight") and name.startswith("blocks.")]:
        array = numpy_helper.to_array(arrays[name]).copy()
        array[7] *= 500
        arrays[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save_model(model, directory / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return Artifact(directory, "model.onnx")


def test_smoothing_saves_a_model_with_outlier_channels(bundle: Artifact, tokens: Artifact, tmp_path: Path) -> None:
    given = outliers(bundle, tmp_path / "outliers")
    ids = list(range(6, 80))
    logits = [open_bundle(path, "cpu", 1).logits(ids) for path in (given.path, bundle.path)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-2, "the same function"
    with pytest.raises(StageError, match="static activations"):
        quantize(tmp_path / "plain", given, tokens, activations="static")
    found = quantize(tmp_path / "smooth", given, tokens, activations="static", smooth=0.5)
    assert found.metrics["bits_per_byte.ratio"] < 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_answers_as_before(
    results: dict[str, StageResult], bundle: Artifact, trained: Artifact, kind: str
) -> None:
    from llmctl.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(trained.path)
    prompts = [tokenizer.encode(text) for text in ("the quick brown ", "pack my box with ", "jugs. the quick")]
    before, after = (open_bundle(x.path, "cpu", 1) for x in (bundle, results[kind].outputs["model"]))
    sampling = Sampling(max_new_tokens=24)
    expected, found = ([list(side.stream(prompt, sampling)) for prompt in prompts] for side in (before, after))
    same = sum(a == b for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= 0.8 * 3 * 24
    batched = after.generate(prompts, sampling)
    assert [len(ids) for ids in batched] == [24] * 3
    if kind == "static":
        assert batched == found, "ranges are constants, so rows do not see each other"


def test_dynamic_ranges_are_of_the_whole_batch(results: dict[str, StageResult]) -> None:
    """Why an answer can depend on its neighbours, which docs/inference.md says."""
    for kind, alike in (("static", True), ("dynamic", False)):
        generator = open_bundle(results[kind].outputs["model"].path, "cpu", 1)
        found = []
        for other in (9, 200):
            rows = generator.rows(2, 8)
            rows.feed(0, [7, 8]), rows.feed(1, [other, other + 1])
            found.append(rows.step([10, other])[0].copy())
        assert np.allclose(*found, rtol=0, atol=1e-5) is alike


@pytest.mark.parametrize("kind", KINDS)
def test_with_an_int8_cache(bundle: Artifact, tokens: Artifact, tmp_path: Path, kind: str) -> None:
    result = quantize(tmp_path, bundle, tokens, activations=kind, kv_cache_dtype="int8")
    assert result.metrics["bits_per_byte.ratio"] < 1.01
    assert result.outputs["model"].metadata["kv_cache_dtype"] == "int8"
    assert "GatherBlockQuantized" not in {node.op_type for node in graph_of(result).node}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_can_stay_float(bundle: Artifact, tokens: Artifact, tmp_path: Path, kind: str) -> None:
    operators = Counter(
        node.op_type for node in graph_of(quantize(tmp_path, bundle, tokens, activations=kind, embedding_bits=0)).node
    )
    assert operators["FusedMatMul"] == 1
    assert operators["MatMulInteger"] + operators["QuantizeLinear"] == (PRODUCTS - 1 if kind == "dynamic" else 8)


def test_weights_in_seven_bits(bundle: Artifact, tokens: Artifact, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(saturation, "exact", lambda limit=127: False)
    for reduce_range, largest in ((True, 64), (False, 127)):
        result = quantize(
            tmp_path / str(reduce_range), bundle, tokens, activations="dynamic", reduce_range=reduce_range
        )
        model = onnx.load(result.outputs["model"] / "model.onnx")
        codes = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
        assert max(np.abs(numpy_helper.to_array(t).astype(int)).max() for t in codes) == largest
        assert result.outputs["model"].metadata["reduce_range"] is reduce_range
        warned = [event["text"] for kind, event in result.events if kind == "warning"]
        assert any("set `reduce_range: true`" in text for text in warned) is not reduce_range


@pytest.mark.slow
def test_a_foreign_decoder(trained: Artifact, tokens: Artifact, tmp_path: Path) -> None:
    """GPT-2 through Optimum: Gemm, a cache that grows, LayerNormalization with a bias."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 262, "n_positions": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, initializer_range=0.1, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    for path in trained.path.glob("*token*"):
        shutil.copy(path, tmp_path / "hf")
    settings = {"exporter": "optimum", "task": "text-generation-with-past", "parity_prompts": 1, "threads": 1}
    model = run_stage(EXPORT_ONNX, tmp_path / "onnx", settings, model=Artifact(tmp_path / "hf", "model.hf"))
    foreign = model.outputs["model"]
    # Random weights are close to undecided, so tokens change more easily than a trained model's.
    free = {"min_top1_agreement": 0.5}
    for kind in KINDS:
        result = quantize(tmp_path / kind, foreign, tokens, activations=kind, **free)
        run = optimised(result, tmp_path)
        assert run["DynamicQuantizeMatMul"] + run["MatMulIntegerToFloat"] == 2 * 4 + 1
        assert run["Gemm"] == 0
        generators = [open_bundle(x.path, "cpu", 1) for x in (foreign, result.outputs["model"])]
        before, after = (g.logits([15, 16, 17, 18]) for g in generators)
        assert 1e-5 < np.abs(before - after).max() < 0.2 * before.std()
        assert len(list(generators[1].stream([15, 16], Sampling(max_new_tokens=5)))) >= 1
    with pytest.raises(InputError, match="no product reads a norm alone") as error:  # something reshapes between
        quantize(tmp_path / "smooth", foreign, tokens, activations="static", smooth=0.5)
    assert error.value.hint == "leave `smooth` out"


def test_equal_inputs_give_equal_bytes(bundle: Artifact, tokens: Artifact, tmp_path: Path) -> None:
    settings = {"activations": "static", "smooth": 0.5, "calibration": "percentile"}
    paths = [quantize(tmp_path / name, bundle, tokens, **settings).outputs["model"].path for name in "ab"]
    contents = [{p.name: p.read_bytes() for p in path.iterdir()} for path in paths]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {p.name for p in bundle.path.iterdir()}, "what calibration wrote is gone"


def test_without_data_static_is_refused_and_dynamic_is_not(bundle: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="static activations take their ranges from text, and there is no `data`"):
        quantize(tmp_path / "static", bundle, activations="static")
    assert QuantizeParams(activations="static").required_inputs() == {"data": "activations: static"}
    assert QuantizeParams(activations="dynamic").required_inputs() == {}
    assert "bits_per_byte" not in quantize(tmp_path / "dynamic", bundle, activations="dynamic").metrics


def test_twice_is_refused(results: dict[str, StageResult], tmp_path: Path) -> None:
    for kind in KINDS:
        with pytest.raises(InputError, match="has no product with a constant float matrix"):
            quantize(tmp_path / kind, results[kind].outputs["model"], activations="dynamic")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"activations": "int8"}, "'auto', 'dynamic' or 'static'"),
        ({"activations": "dynamic", "bits": 4}, "`activations: dynamic` multiplies 8-bit weights: `bits: 8`"),
        ({"activations": "static", "bits": 0, "kv_cache_dtype": "int8"}, "`activations` is about weights"),
        ({"activations": "dynamic", "method": "rtn"}, "`method` is for weights in blocks"),
        ({"activations": "dynamic", "block_size": 32}, "`block_size` is for weights in blocks"),
        ({"activations": "static", "symmetric": True}, "`symmetric` is for weights in blocks"),
        ({"activations": "static", "accuracy_level": 0}, "`accuracy_level` is for weights in blocks"),
        ({"activations": "dynamic", "embedding_bits": 4}, "`embedding_bits: 8`, or 0"),
        ({"activations": "dynamic", "calibration": "entropy"}, "`calibration` is for `activations: static`"),
        ({"activations": "dynamic", "smooth": 0.5}, "`smooth` is for `activations: static`"),
        ({"activations": "dynamic", "calibration_tokens": 64}, "`calibration_tokens` is for"),
        ({"activations": "static", "percentile": 99.0}, "`percentile` is for `calibration: percentile`"),
        ({"reduce_range": True}, "`reduce_range` is for `activations: dynamic` or `static`"),
        ({"activations": "static", "smooth": 1.5}, "less than or equal to 1"),
        ({"activations": "static", "calibration": "percentile", "percentile": 50.0}, "greater than 50"),
    ],
)
def test_parameters_that_would_change_nothing(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeParams.model_validate(params)
