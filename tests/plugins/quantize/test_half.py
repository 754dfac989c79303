"""`bits: 16`: the graph in float16, as an export in float16 has it, and what float16 cannot hold."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from llmctl import Artifact, InputError, StageError
from llmctl.generator import Sampling
from llmctl.ort import open_bundle, open_encoder
from llmctl.testing import StageResult, run_stage
from llmctl_export_onnx import EXPORT_ONNX
from llmctl_quantize import QUANTIZE, halves
from llmctl_quantize.params import QuantizeParams

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

FLOAT, HALF = 1, 10
IDS = np.random.default_rng(1).integers(0, 262, 60).tolist()


def quantize(directory: Path, bundle: Artifact, data: Artifact | None = None, **params: Any) -> StageResult:
    settings = {"bits": 16, "threads": 1, "speed_rounds": 1, **params}
    return run_stage(QUANTIZE, directory, settings, model=bundle, data=data)


def export(directory: Path, model: Artifact, **params: Any) -> Artifact:
    settings = {"parity_prompts": 1, "threads": 1, **params}
    return run_stage(EXPORT_ONNX, directory, settings, model=model).outputs["model"]


@pytest.fixture(scope="module")
def halved(bundle: Artifact, tokens: Artifact, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    return quantize(tmp_path_factory.mktemp("half"), bundle, tokens)


@pytest.fixture(scope="module")
def exported(trained: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tmp_path_factory.mktemp("exported"), trained, dtype="float16")


def types(path: Path) -> dict[str, int]:
    graph = onnx.load(path / "model.onnx").graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}


def logits(bundle: Artifact, ids: list[int]) -> np.ndarray:
    return open_bundle(bundle.path, "cpu", 1).logits(ids)


def greedy(bundle: Artifact, prompt: list[int]) -> list[int]:
    return list(open_bundle(bundle.path, "cpu", 1).stream(prompt, Sampling(temperature=0.0, max_new_tokens=30)))


def plant(bundle: Artifact, directory: Path, name: str, value: float) -> Artifact:
    """The bundle with one number of a stored tensor changed."""
    path = Path(shutil.copytree(bundle.path, directory))
    model = onnx.load(path / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[(3,) * array.ndim] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    (path / "model.onnx.data").unlink()
    onnx.save_model(model, path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return Artifact(path, "model.onnx")


def test_it_is_what_an_export_in_float16_is(halved: StageResult, exported: Artifact, trained: Artifact) -> None:
    """Torch rounds there, numpy here: the same file of weights, the same types, the same logits bit for bit."""
    path = halved.outputs["model"].path
    assert types(path) == types(exported.path)
    assert HALF in types(path).values()
    assert FLOAT not in types(path).values()
    for file in exported.path.iterdir():
        if file.name != "model.onnx":
            assert (path / file.name).read_bytes() == file.read_bytes(), file.name
    operators = [
        Counter(node.op_type for node in onnx.load(where / "model.onnx").graph.node) for where in (path, exported.path)
    ]
    assert operators[0] == operators[1]
    onnx.checker.check_model(str(path / "model.onnx"))
    assert np.array_equal(logits(halved.outputs["model"], IDS), logits(exported, IDS))


def test_greedy_tokens_are_those_of_the_export(halved: StageResult, exported: Artifact, bundle: Artifact) -> None:
    prompts = [IDS[:n] for n in (1, 5, 17)]
    assert [greedy(halved.outputs["model"], p) for p in prompts] == [greedy(exported, p) for p in prompts]
    # And of float32, until two of its logits are nearer to each other than the two graphs are.
    for prompt in prompts:
        chosen = greedy(halved.outputs["model"], prompt)
        expected = logits(bundle, [*prompt, *chosen[:-1]])[len(prompt) - 1 :]
        found = logits(halved.outputs["model"], [*prompt, *chosen[:-1]])[len(prompt) - 1 :]
        best = np.sort(expected, axis=1)
        clear = best[:, -1] - best[:, -2] > 2 * np.abs(found - expected).max(axis=1)
        assert clear.sum() > 20
        assert (expected.argmax(axis=1) == chosen)[clear].all()


def test_logits_are_within_the_roundings_of_float16(halved: StageResult, bundle: Artifact) -> None:
    expected, found = logits(bundle, IDS), logits(halved.outputs["model"], IDS)
    bound = 32 * np.finfo(np.float16).eps * max(1.0, np.abs(expected).max())
    assert 0 < np.abs(found - expected).max() < bound
    assert 0 < halved.metrics["logits.max_abs_diff"] < bound
    # The control: the same numbers with one logit moved, or none, are not within it.
    moved = expected.copy()
    moved[3, 5] += 1.01 * bound
    assert halves.excess(moved, expected) > 1
    assert not halves.excess(np.full_like(expected, np.nan), expected) <= 1


def test_the_weights_take_exactly_half(halved: StageResult, bundle: Artifact) -> None:
    """Two bytes a parameter instead of four, in the file of weights."""
    parameters = 262 * 96 + 96 + 2 * (2 * 96 + 96 * (96 + 48 + 48) + 96 * 96 + 3 * 96 * 160)
    before, after = onnx.load(bundle.path / "model.onnx"), onnx.load(halved.outputs["model"].path / "model.onnx")
    for model, width, kind in ((before, 4, FLOAT), (after, 2, HALF)):
        stored = [t for t in model.graph.initializer if t.data_type == kind and t.name != "mul_8"]
        assert sum(len(t.raw_data) for t in stored) == width * parameters
    sizes = [(path / "model.onnx.data").stat().st_size for path in (bundle.path, halved.outputs["model"].path)]
    assert sizes[0] == 2 * sizes[1]
    assert halved.metrics["parameters"] == pytest.approx(parameters, abs=12)  # the angles' frequencies
    assert 0.5 <= halved.metrics["bytes.ratio"] < 0.51


def test_quality_is_measured_and_has_a_tight_budget(halved: StageResult, bundle: Artifact, tokens: Artifact) -> None:
    assert QuantizeParams(bits=16).budget == 0.001
    assert abs(halved.metrics["bits_per_byte.ratio"] - 1) < 0.001
    assert halved.metrics["top1_agreement"] > 0.98
    assert halved.metrics["decode.tokens_per_s"] > 0


def test_a_budget_that_is_exceeded_leaves_no_bundle(
    bundle: Artifact, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the measurement: weights of three digits fewer cost more than the budget."""
    exact = halves.rounded

    def coarse(name: str, array: np.ndarray) -> np.ndarray:
        return exact(name, array if array.size < 100 else np.round(array, 1))

    monkeypatch.setattr(halves, "rounded", coarse)
    monkeypatch.setattr(halves, "ROUNDINGS", 1e6)
    with pytest.raises(StageError, match=r"16 bits raise bits per byte by .*, the budget is 0\.10%") as caught:
        quantize(tmp_path, bundle, tokens)
    assert caught.value.hint == "keep the bundle in float32, or try `bits: 8`, or raise `max_bits_per_byte_rise`"
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["embedding.weight", "blocks.1.ffn.down.weight", "blocks.0.ffn_norm.weight"])
@pytest.mark.parametrize("value", [70_000.0, -65_520.0])
def test_a_weight_beyond_float16_is_refused(bundle: Artifact, tmp_path: Path, name: str, value: float) -> None:
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(value)), "what plain rounding makes of it"
    planted = plant(bundle, tmp_path / "planted", name, value)
    message = rf"`{name}` holds {value:.8g}, and the largest number of float16 is 65504"
    with pytest.raises(InputError, match=message) as caught:
        quantize(tmp_path / "out", planted)
    assert "\n" not in str(caught.value)
    assert "`bits: 8`" in str(caught.value.hint)
    assert not (tmp_path / "out" / "model").exists()


def test_the_largest_weight_that_it_can_hold_stays(bundle: Artifact, tmp_path: Path) -> None:
    model = onnx.load(plant(bundle, tmp_path / "planted", "embedding.weight", 65_519.0).path / "model.onnx")
    halves.halve(model)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert stored["embedding.weight"][3, 3] == 65504
    assert all(np.isfinite(array).all() for array in stored.values())


def test_activations_that_leave_the_range_are_noticed(bundle: Artifact, tmp_path: Path) -> None:
    """Each weight fits, and their products do not: without `data`, too."""
    planted = plant(bundle, tmp_path / "planted", "norm.weight", 60_000.0)
    planted = plant(planted, tmp_path / "twice", "embedding.weight", 60_000.0)
    with pytest.raises(StageError, match="`logits` in float16 is (nan|inf) times as far off as rounding explains"):
        quantize(tmp_path / "out", planted)
    assert not (tmp_path / "out" / "model").exists()


def test_weights_that_become_0_are_counted(bundle: Artifact, halved: StageResult, tmp_path: Path) -> None:
    """Half of the smallest number, 2^-25, is rounded to 0; a little more is not."""
    assert halved.metrics["weights.zeroed"] == 0
    for value, zeroed in ((2.0**-25, 1), (2.0**-25 * 1.01, 0)):
        model = onnx.load(plant(bundle, tmp_path / str(zeroed), "embedding.weight", value).path / "model.onnx")
        found = halves.halve(model)
        assert (found.zeroed, found.share) == (zeroed, zeroed / found.weights)


def test_what_is_no_float32_bundle_is_refused(
    bundle: Artifact, halved: StageResult, exported: Artifact, tokens: Artifact, tmp_path: Path
) -> None:
    for name, half in (("twice", halved.outputs["model"]), ("exported", exported)):
        with pytest.raises(InputError, match="is in half precision already") as caught:
            quantize(tmp_path / name, half)
        assert caught.value.hint == "`bits: 16` starts from a float32 bundle"
    settings: dict[str, dict[str, Any]] = {
        "MatMulNBits": {"bits": 4, "method": "rtn"},
        "MatMulInteger": {"bits": 8, "activations": "dynamic"},
        "an int8 cache": {"bits": 0, "kv_cache_dtype": "int8"},
    }
    for name, params in settings.items():
        once = quantize(tmp_path / name, bundle, tokens if "cache" in name else None, **params).outputs["model"]
        with pytest.raises(InputError, match=f"the graph is quantized already .*{name}"):
            quantize(tmp_path / f"{name} twice", once)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "rtn"}, "`method` is for weights of 4 or 8 bits"),
        ({"block_size": 32}, "`block_size` is for weights of 4 or 8 bits"),
        ({"symmetric": True}, "`symmetric` is for weights of 4 or 8 bits"),
        ({"accuracy_level": 0}, "`accuracy_level` is for weights of 4 or 8 bits"),
        ({"embedding_bits": 4}, "`embedding_bits` is for weights of 4 or 8 bits"),
        ({"activations": "dynamic"}, "`activations` is for weights of 4 or 8 bits"),
        ({"kv_cache_dtype": "int8"}, "`kv_cache_dtype: int8` needs a float32 graph"),
        ({"smooth": 0.5}, "`smooth` is for `activations: static`"),
        ({"reduce_range": True}, "`reduce_range` is for `activations"),
        ({"calibration_tokens": 64}, "`calibration_tokens` is for"),
    ],
)
def test_parameters_that_would_change_nothing(params: dict[str, Any], message: str) -> None:
    QuantizeParams(bits=16)
    with pytest.raises(ValidationError, match=message):
        QuantizeParams.model_validate({"bits": 16, **params})


def test_an_encoder(tmp_path: Path) -> None:
    """Features and a mean of them, whose count of tokens is exact."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "dim": 32, "layers": 2, "heads": 4, "context": 48, "token_types": 2}
    save_model(Transformer(ModelConfig(arch="bert", head="features", **shape, pad_id=0)), tmp_path / "hf")
    single = export(tmp_path / "single", Artifact(tmp_path / "hf", "model.hf"), pooling="mean")
    result = quantize(tmp_path / "half", single)
    assert set(types(result.outputs["model"].path).values()) == {HALF, 7}
    rows = [[5, 6, 7, 8, 9], [3, 4]]
    found, expected = (open_encoder(b.path, "cpu", 1).run(rows) for b in (result.outputs["model"], single))
    for name, value in expected.items():
        assert 0 < np.abs(found[name] - value).max() < 32 * np.finfo(np.float16).eps * max(1, np.abs(value).max())
    assert 0 < result.metrics["outputs.relative_difference"] < 0.01


@pytest.mark.slow
def test_a_foreign_decoder(tmp_path: Path) -> None:
    """Llama through Optimum: angles from positions, norms spelled out, masks of float32's smallest number."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
        max_position_embeddings=4096,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 5000  # squares of it are beyond float16
    model.save_pretrained(tmp_path / "hf")
    settings = {"exporter": "optimum", "task": "text-generation-with-past"}
    single = export(tmp_path / "single", Artifact(tmp_path / "hf", "model.hf"), **settings)
    result = quantize(tmp_path / "half", single)
    path = result.outputs["model"].path
    assert set(types(path).values()) == {HALF, 7}
    ids = np.random.default_rng(2).integers(2, 97, 40).tolist()
    expected, found = logits(single, ids), logits(result.outputs["model"], ids)
    bound = 32 * np.finfo(np.float16).eps * max(1, np.abs(expected).max())
    assert 0 < np.abs(found - expected).max() < bound
    assert len(greedy(result.outputs["model"], ids[:4])) >= 1
    # Far positions, by ONNX's reference: the angles turn queries and keys alike, so that only distances count.
    feeds: dict[str, np.ndarray] = {}
    for name, kind in types(path).items():
        if name.startswith("past"):
            feeds[name] = np.zeros((1, 2, 0, 16), np.float16 if kind == HALF else np.int64)
    feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, 40), np.int64)}
    feeds["position_ids"] = np.arange(3001, 3041)[None]
    assert np.abs(reference(onnx.load(path / "model.onnx"), feeds)[0] - expected).max() < bound


def reference(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """By ONNX's own reference, which rounds what a graph says is float16 (ONNX Runtime does not on a processor)."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, feeds)[0].astype(np.float64)


def halved_copy(model: Any) -> Any:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    halves.halve(copied)
    onnx.checker.check_model(copied, full_check=True)
    return copied


HEAD = '<ir_version: 10, opset_import: ["" : 18]> g'
NORM = """(float[N, 4] x) => (float[N, 4] y)
<float two = {2}, float tiny = {1e-12}, int64[1] last = {-1}, float[4] gain = {1, 2, 3, 4}> {
    square = Pow(x, two)
    mean = ReduceMean(square, last)
    sum = Add(mean, tiny)
    root = Sqrt(sum)
    unit = Div(x, root)
    y = Mul(unit, gain)
}"""
ANGLES = """(int64[N, 1] p) => (float[N, 4] y)
<float[4] frequencies = {1, 0.1, 0.01, 0.001}, float[4] gain = {1, 2, 3, 4}> {
    f = Cast <to = 1> (p)
    angles = Mul(f, frequencies)
    c = Cos(angles)
    y = Mul(c, gain)
}"""
BUCKETS = """(int64[N] p) => (float[N, 1] y)
<float third = {0.33333334}, float[1400, 1] table> {
    f = Cast <to = 1> (p)
    parts = Mul(f, third)
    place = Cast <to = 7> (parts)
    y = Gather(table, place)
}"""
PLACES = np.arange(4000, 4100)


def test_norms_that_are_spelled_out_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control, squares in float16, gives zeros for rows of large numbers, and no numbers for one of zeros."""
    model = onnx.parser.parse_model(HEAD + NORM)
    x = np.array([[400, -500, 600, 700], [1e-4, 2e-4, -1e-4, 1e-4], [0, 0, 0, 0]], np.float16)
    exact = x.astype(np.float64)
    expected = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-12) * [1, 2, 3, 4]
    half = halved_copy(model)
    assert np.allclose(reference(half, {"x": x}), expected, rtol=4 * np.finfo(np.float16).eps, atol=0)
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    assert [(node.input[0], node.output[0]) for node in casts] == [("x", "x_float32"), ("root_float32", "root")]
    monkeypatch.setattr(halves, "_LARGE", ())
    with np.errstate(all="ignore"):
        wrong = reference(halved_copy(model), {"x": x})
    assert (wrong[0] == 0).all()
    assert np.isnan(wrong[2]).all()


def test_angles_of_late_positions_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: float16 counts to 2048, and in fours from 4096."""
    model = onnx.parser.parse_model(HEAD + ANGLES)
    expected = np.cos(PLACES[:, None] * np.array([1, 0.1, 0.01, 0.001])) * [1, 2, 3, 4]
    within = {"rtol": 4 * np.finfo(np.float16).eps, "atol": 2e-3}
    assert np.allclose(reference(halved_copy(model), {"p": PLACES[:, None]}), expected, **within)
    monkeypatch.setattr(halves, "_EXACT", ())
    assert np.abs(reference(halved_copy(model), {"p": PLACES[:, None]}) - expected).max() > 0.5


def test_whole_numbers_are_found_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As T5 finds the bucket of a distance; the control rounds before."""
    model = onnx.parser.parse_model(HEAD + BUCKETS)
    table = np.arange(1400, dtype=np.float32)[:, None]
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    expected = (PLACES.astype(np.float32) * np.float32(1 / 3)).astype(np.int64)
    assert (reference(halved_copy(model), {"p": PLACES})[:, 0] == expected).all()
    monkeypatch.setattr(halves, "_is_exact", lambda *_: False)
    assert (reference(halved_copy(model), {"p": PLACES})[:, 0] != expected).any()


def test_constants_of_nodes_and_masks() -> None:
    """Constants that nodes hold are rounded as well, and what stands for infinity is the largest there is."""
    text = """(float[N] x) => (float[N] y)
    {
        least = Constant <value_float = -3.4028234e38> ()
        half = Constant <value = float[1] {0.5}> ()
        size = Shape(x)
        zeros = ConstantOfShape(size)
        ones = ConstantOfShape <value = float[1] {1}> (size)
        kept = Mul(x, half)
        bad = Less(kept, zeros)
        masked = Where(bad, least, kept)
        y = Add(masked, ones)
    }"""
    half = halved_copy(onnx.parser.parse_model(HEAD + text))
    assert {tensor.data_type for tensor in half.graph.initializer} == {HALF}
    assert reference(half, {"x": np.array([4, -4], np.float16)}).tolist() == [3, -65504]


def test_branches_are_refused() -> None:
    text = """(bool c, float[N] x) => (float[N] y) <float[1] w = {1}> {
        y = If (c) <
            then_branch = a () => (float[N] b) { b = Mul(x, w) },
            else_branch = d () => (float[N] e) { e = Add(x, w) }
        >
    }"""
    with pytest.raises(InputError, match="branches, loops or functions of its own") as caught:
        halves.halve(onnx.parser.parse_model(HEAD + text))
    assert "\n" not in str(caught.value)
