"""Keys and values in int8: the operator against numpy, the stage's scales, and the engine on such a bundle."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from pydantic import ValidationError

from llmctl import Artifact, InputError, MachineError, StageError
from llmctl.engine import Engine, EngineOptions, Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator, open_bundle, sessions
from llmctl.testing import StageResult, run_stage
from llmctl_export_onnx import EXPORT_ONNX
from llmctl_quantize import QUANTIZE, cache
from llmctl_quantize.params import QuantizeParams

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
    value, stored_as = helper.make_tensor_value_info, [None, kv, None, width]
    inputs = [value(n, kinds.FLOAT, [None, None, h * width]) for n, h in (("q", heads), ("k", kv), ("v", kv))]
    inputs += [value(name, kinds.INT8, stored_as) for name in ("past_k", "past_v")]
    inputs += [value("last", kinds.INT32, [None]), value("total", kinds.INT32, [1])]
    inputs += [value("bias", kinds.FLOAT, [None, heads, None, None])] if biased else []
    outputs = [value("out", kinds.FLOAT, [None, None, heads * width])]
    outputs += [value(name, kinds.INT8, stored_as) for name in ("present_k", "present_v")]
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


# -- the stage --------------------------------------------------------------------------------------------------------


def quantize(directory: Path, bundle: Artifact, data: Artifact | None, **params: Any) -> StageResult:
    settings = {"bits": 0, "kv_cache_dtype": "int8", "threads": 1, "speed_rounds": 1, **params}
    return run_stage(QUANTIZE, directory, settings, model=bundle, data=data)


def load(bundle: Artifact) -> tuple[Any, dict[str, np.ndarray]]:
    model = onnx.load(bundle / "model.onnx")
    return model, {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.fixture(scope="session")
def result(bundle: Artifact, tokens: Artifact, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    return quantize(tmp_path_factory.mktemp("int8"), bundle, tokens)


@pytest.fixture(scope="session")
def int8(result: StageResult) -> OrtGenerator:
    return open_bundle(result.outputs["model"].path, "cpu", 1)


@pytest.fixture(scope="session")
def float32(bundle: Artifact) -> OrtGenerator:
    return open_bundle(bundle.path, "cpu", 1)


def test_only_the_cache_changes(bundle: Artifact, result: StageResult) -> None:
    made = result.outputs["model"]
    (before, floats), (after, arrays) = load(bundle), load(made)
    assert [node.op_type for node in before.graph.node] == [node.op_type for node in after.graph.node]
    scales = {f"past_key_values.{layer}.{kind}_scale" for layer in range(2) for kind in ("key", "value")}
    assert set(arrays) - set(floats) == scales
    assert all(np.array_equal(arrays[name], array) for name, array in floats.items())
    ports = {value.name: value.type.tensor_type.elem_type for value in (*after.graph.input, *after.graph.output)}
    assert {name for name, kind in ports.items() if kind == kinds.INT8} == {
        n for n in ports if ".key" in n or ".v" in n
    }
    assert {p.name for p in made.path.iterdir()} == {p.name for p in bundle.path.iterdir()}
    assert made.metadata["kv_cache_dtype"] == "int8"
    assert "bits" not in made.metadata, "the weights are as they were"


def test_scales_are_the_largest_magnitudes_of_the_training_split(
    bundle: Artifact, tokens: Artifact, result: StageResult
) -> None:
    """Against one run of the float graph from an empty cache, which returns keys as they are stored: turned."""
    from llmctl.text.shards import TokenShards

    ids = TokenShards.open(tokens).split("train").tokens.astype(np.int64)
    session = ort.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    names = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    largest = dict.fromkeys(names, np.zeros((2, 24)))
    for start in range(0, len(ids) - 1, 96):
        window = ids[None, start : start + 96]
        feeds = {"input_ids": window, "attention_mask": np.ones_like(window)}
        empty = dict.fromkeys(names, np.zeros((1, 2, 0, 24), np.float32))
        found = session.run([name.replace("past_key_values", "present") for name in names], {**feeds, **empty})
        largest = {n: np.maximum(largest[n], np.abs(x[0]).max(axis=1)) for n, x in zip(names, found, strict=True)}
    arrays = load(result.outputs["model"])[1]
    for name in names:
        assert arrays[f"{name}_scale"] == pytest.approx(largest[name].reshape(-1) / 127, rel=1e-4)


def test_the_cache_takes_a_quarter(result: StageResult, int8: OrtGenerator, float32: OrtGenerator) -> None:
    size = 2 * 2 * 2 * 24  # layers, keys and values, heads, channels
    assert result.metrics["cache.bytes_per_token"] == size
    assert result.metrics["cache.bytes_per_token.before"] == 4 * size
    options = EngineOptions(slots=3, context=64)
    held = []
    for generator in (int8, float32):
        engine: Any = generator.engine(options)
        held.append(engine.memory_bytes)
        assert sum(array.nbytes for array in engine._slots.memory._arrays) == engine._slots.memory_bytes
        engine.close()
    assert held[0] * 4 == held[1]
    assert held[0] >= 3 * 64 * size


def test_beside_a_gpu_the_cpu_is_taken(result: StageResult, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The GPU is pretended: a session of the CPU that says it is CUDA's, unless the CPU is asked for."""
    asked: list[str] = []
    path = result.outputs["model"].path

    def opened(model: Path, device: str, threads: int) -> Any:
        asked.append(device)
        return sessions.open_session(model, "cpu", threads)

    monkeypatch.setattr("llmctl.ort.generator.open_session", opened)
    monkeypatch.setattr("llmctl.ort.cache.provider", lambda _: "CPU" if asked[-1] == "cpu" else sessions.CUDA)
    assert open_bundle(path, "auto", 1).layout.device == "cpu"
    assert asked == ["auto", "cpu"]
    assert "an int8 cache is for the CPU" in caplog.text
    with pytest.raises(MachineError, match="an int8 cache is for the CPU"):
        open_bundle(path, "cuda", 1)


def nats(generator: OrtGenerator, tokens: Artifact) -> float:
    """Mean loss of the held-out split."""
    from llmctl.text.shards import TokenShards

    ids = TokenShards.open(tokens).split("validation").tokens.tolist()
    return -float(np.concatenate([generator.logprobs(ids[at : at + 96]) for at in range(0, len(ids) - 1, 96)]).mean())


def test_held_out_perplexity_stays(
    result: StageResult, int8: OrtGenerator, float32: OrtGenerator, tokens: Artifact
) -> None:
    """The bound of KV caches in int8 that is published for far larger models: less than 0.01."""
    before, after = (math.exp(nats(generator, tokens)) for generator in (float32, int8))
    assert before < 8, "the model has learned something"
    assert 0 < abs(after - before) < 0.01
    assert result.metrics["bits_per_byte.ratio"] < 1.005
    assert result.metrics["top1_agreement"] > 0.99


def test_a_cache_that_costs_too_much_is_refused(
    bundle: Artifact, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with steps forty times as wide, which is less than three bits, the gate sees it."""
    right = cache.calibrate
    monkeypatch.setattr(cache, "calibrate", lambda *given: {n: x * 40 for n, x in right(*given).items()})
    with pytest.raises(StageError, match=r"an int8 cache raises bits per byte by .*%, the budget is 1\.00%"):
        quantize(tmp_path, bundle, tokens)
    assert not list(tmp_path.rglob("*.onnx*"))
    with pytest.raises(StageError, match=r"8 bits and an int8 cache raise bits per byte"):
        quantize(tmp_path, bundle, tokens, bits=8)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_and_cache_together(bundle: Artifact, tokens: Artifact, tmp_path: Path, bits: int) -> None:
    result = quantize(tmp_path, bundle, tokens, bits=bits)
    operators = Counter(node.op_type for node in load(result.outputs["model"])[0].graph.node)
    assert operators["MatMulNBits"] == 2 * 6 + 1
    assert open_bundle(result.outputs["model"].path, "cpu", 1).layout.cache_dtype is np.int8
    assert result.metrics["bits_per_byte.ratio"] < (1.05 if bits == 4 else 1.01)
    assert {**result.outputs["model"].metadata, "parameters": 0} == {
        "bits": bits,
        "kv_cache_dtype": "int8",
        "parameters": 0,
    }


def test_one_after_the_other(bundle: Artifact, tokens: Artifact, result: StageResult, tmp_path: Path) -> None:
    """Weights after the cache and cache after the weights: what was done before stays, and stays told."""
    settings = {"bits": 4, "threads": 1, "speed_rounds": 1, "accuracy_level": 0}
    four = run_stage(QUANTIZE, tmp_path / "four", settings, model=bundle, data=None).outputs["model"]
    cache_last = quantize(tmp_path / "a", four, tokens).outputs["model"]
    cache_first = run_stage(QUANTIZE, tmp_path / "b", settings, model=result.outputs["model"], data=tokens)
    for made in (cache_last, cache_first.outputs["model"]):
        assert (made.metadata["bits"], made.metadata["kv_cache_dtype"]) == (4, "int8")
        assert open_bundle(made.path, "cpu", 1).layout.cache_dtype is np.int8
    with pytest.raises(InputError, match="has an int8 cache already"):
        quantize(tmp_path / "again", cache_last, tokens)


def test_equal_inputs_give_equal_bytes(bundle: Artifact, tokens: Artifact, result: StageResult, tmp_path: Path) -> None:
    again = quantize(tmp_path, bundle, tokens).outputs["model"].path
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in result.outputs["model"].path.iterdir()
    }


def test_calibration_reads_as_much_as_it_is_told(bundle: Artifact, tmp_path: Path, monkeypatch) -> None:
    """Of conversations the whole text, from the training split, where the held-out one is another."""
    read: list[list[int]] = []
    right = cache.calibrate
    monkeypatch.setattr(
        cache, "calibrate", lambda g, texts, progress: (read.extend(texts), right(g, texts, progress))[1]
    )
    for split, word in (("train", "brown"), ("validation", "lazy")):
        rows = [
            {
                "id": str(i),
                "messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "fox " * 9}],
            }
            for i in range(9)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = Artifact(tmp_path, "dataset.chat")
    quantize(tmp_path / "out", bundle, data, calibration_tokens=100, max_bits_per_byte_rise=1.0)
    assert len(read) == math.ceil(100 / len(read[0]))
    from llmctl.text.tokenizer import Tokenizer

    assert "brown" in Tokenizer.load(bundle.path).decode(read[0])


# -- what is refused --------------------------------------------------------------------------------------------------


def test_without_data_a_spec_is_refused_before_anything_runs(tmp_path: Path) -> None:
    from llmctl.registry import get_registry
    from llmctl.spec.diagnostics import SpecError
    from llmctl.spec.pipeline import load_pipeline

    spec = tmp_path / "spec.yaml"
    text = "llmctl: 1\nname: t\nstages:\n  q:\n    uses: quantize\n    inputs: {model: ./exports/it%s}\n"
    setting = "    with: {kv_cache_dtype: int8}\n"
    spec.write_text(text % "" + setting)
    with pytest.raises(SpecError) as caught:
        load_pipeline(str(spec), (), (), registry=get_registry())
    (found,) = caught.value.diagnostics
    assert (found.code, found.mark.line) == ("E124", 6)
    assert found.message == (
        "required input `data` (dataset.tokens or dataset.chat) of `quantize` is missing: "
        "`kv_cache_dtype: int8` needs it"
    )
    assert "inputs: {data: STAGE or ./PATH}" in found.hint
    for fine in (text % ", data: ./tokens" + setting, text % ""):
        spec.write_text(fine)
        load_pipeline(str(spec), (), (), registry=get_registry())


def test_one_split_is_judged_by_itself_and_said_to_be(
    bundle: Artifact, tokens: Artifact, result: StageResult, tmp_path: Path
) -> None:
    from llmctl.text.shards import ShardWriter, TokenShards

    shards = TokenShards.open(tokens)
    with ShardWriter(tmp_path / "one", vocab_size=262, tokenizer=shards.tokenizer, splits=("train",)) as writer:
        writer.add("train", np.asarray(shards.split("train").tokens).tolist(), 999)
    one = Artifact(tmp_path / "one", "dataset.tokens")
    found = quantize(tmp_path / "out", bundle, one, calibration_tokens=64)
    assert any(kind == "warning" and "has one split" in event["text"] for kind, event in found.events)
    assert not any(kind == "warning" and "has one split" in event["text"] for kind, event in result.events)

    both = {"bits": 8, "activations": "static", "min_top1_agreement": 0.0, "max_bits_per_byte_rise": 9.0}
    found = quantize(tmp_path / "both", bundle, one, calibration_tokens=64, **both)
    warned = [event["text"] for kind, event in found.events if kind == "warning"]
    assert sum("has one split" in text for text in warned) == 1, "what calibrates cache and activations is read once"


def test_without_data_the_stage_fakes_nothing(bundle: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes its scales from text, and there is no `data`"):
        quantize(tmp_path, bundle, None)
    assert not list(tmp_path.rglob("*.onnx*"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 0}, "`bits: 0` leaves nothing to do without `kv_cache_dtype: int8`"),
        ({"calibration_tokens": 99}, "`calibration_tokens` is for `kv_cache_dtype: int8`"),
        ({"bits": 0, "kv_cache_dtype": "int8", "block_size": 32}, "`block_size` is about weights"),
        ({"bits": 0, "kv_cache_dtype": "int8", "embedding_bits": 4}, "`embedding_bits` is about weights"),
        ({"kv_cache_dtype": "int4"}, "Input should be 'auto' or 'int8'"),
    ],
)
def test_parameters_that_would_change_nothing(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeParams(**params)


def test_half_precision_is_refused(trained: Artifact, tokens: Artifact, tmp_path: Path) -> None:
    params = {"dtype": "float16", "parity_prompts": 1, "threads": 1}
    half = run_stage(EXPORT_ONNX, tmp_path / "half", params, model=trained).outputs["model"]
    with pytest.raises(InputError, match="computes in half precision, and the CPU's operator rounds float32 only"):
        quantize(tmp_path / "out", half, tokens)


def test_a_graph_that_concatenates_its_cache_is_refused(bundle: Artifact, tokens: Artifact, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=80, n_embd=64, n_layer=1, n_head=4)).save_pretrained(
        tmp_path / "hf"
    )
    settings = {"exporter": "optimum", "task": "text-generation-with-past", "parity_prompts": 1, "threads": 1}
    foreign = run_stage(EXPORT_ONNX, tmp_path / "onnx", settings, model=Artifact(tmp_path / "hf", "model.hf"))
    with pytest.raises(InputError, match="does not keep its cache in GroupQueryAttention") as caught:
        quantize(tmp_path / "out", foreign.outputs["model"], tokens)
    assert "leave `kv_cache_dtype` out" in str(caught.value.hint)


# -- other architectures ----------------------------------------------------------------------------------------------


def exported(directory: Path, **changes: Any) -> Artifact:
    """The bundle of a model with random weights, no two norms alike."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    shape = {"vocab_size": 97, "dim": 32, "layers": 2, "heads": 4, "context": 48, "bos_id": 0, "eos_id": 1, "pad_id": 2}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    save_model(model, directory / "hf")
    params = {"parity_prompts": 2, "threads": 1}
    return run_stage(EXPORT_ONNX, directory, params, model=Artifact(directory / "hf", "model.hf")).outputs["model"]


def with_int8(directory: Path, bundle: Artifact, texts: list[list[int]]) -> tuple[OrtGenerator, OrtGenerator]:
    """The bundle and, by the same steps as the stage, the same with an int8 cache: no tokenizer is needed."""
    generator = open_bundle(bundle.path, "cpu", 1)
    model = onnx.load(bundle / "model.onnx")
    cache.refuse(model, bundle.path)
    cache.quantize(model, cache.calibrate(generator, texts, lambda done, total: None))
    shutil.copytree(bundle.path, directory, ignore=shutil.ignore_patterns("model.onnx*"))
    onnx.save(model, directory / "model.onnx")
    return generator, open_bundle(directory, "cpu", 1)


def architectures() -> dict[str, dict[str, Any]]:
    from llmctl.nn.config import TRAITS

    return {
        "turned inside, grouped": {"arch": "llama", "head_dim": 16, "kv_heads": 2},
        "padded heads": {"arch": "llama", "dim": 40},
        "windows, softcaps": {
            "arch": "gemma2",
            "pattern": "SL",
            "window": 6,
            "attention_softcap": 5.0,
            "logit_softcap": 3.0,
            "head_dim": 16,
        },
        "ALiBi": {"arch": "bloom"},
        "T5 bias": {"arch": "lamda"},
        "tokens in the cache": {
            "arch": "speedrun",
            "traits": replace(TRAITS["speedrun"], smear=True),
            "value_pattern": "V-",
            "vocab_size": 700,
            "kv_heads": 1,
            "tie_embeddings": False,
        },
    }


NAMES = ("turned inside, grouped", "padded heads", "windows, softcaps", "ALiBi", "T5 bias", "tokens in the cache")


def rounding(model: Any, scales: list[np.ndarray]) -> Any:
    """A backend of torch's attention that rounds turned keys, and values, before it attends; `scales` by tensor."""
    from llmctl.nn.attention import Sdpa, gather

    heads, width = model.config.kv_heads, model.config.head_dim
    steps = [torch.from_numpy(scale[:, :width].copy()).reshape(1, 1, heads, width) for scale in scales]

    class Rounding(Sdpa):
        def attend(self, q: Any, k: Any, v: Any, layer: int, context: Any, bias: Any) -> Any:
            q, k = context.rotated(q, k, layer)
            pairs = zip((k, v), steps[2 * layer : 2 * layer + 2], strict=True)
            rounded = ((x / step).round().clamp(-128, 127) * step for x, step in pairs)
            return self.over(q, *gather(*rounded, layer, context), context.config.layer_window(layer), context, bias)

    return Rounding()


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_every_kind_of_attention_computes_what_torch_does_over_rounded_keys(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the codes of ties, so the error is measured against what rounding itself does."""
    from llmctl.nn.attention import BACKENDS
    from llmctl.nn.hf import load_model

    changes = architectures()[name]
    texts = np.random.default_rng(0).integers(3, changes.get("vocab_size", 97), (20, 48)).tolist()
    before, after = with_int8(tmp_path / "int8", exported(tmp_path, **changes), texts[1:])
    model = load_model(tmp_path / "hf").eval()
    scales = cache.calibrate(before, texts[1:], lambda done, total: None)
    monkeypatch.setitem(BACKENDS, "rounding", rounding(model, list(scales.values())))
    model.backend = "rounding"
    with torch.inference_mode():
        expected = model(torch.tensor(texts[:1]))[0].numpy()
    got = after.logits(texts[0])
    caused = np.sqrt(((before.logits(texts[0]) - got) ** 2).mean())
    assert 1e-4 < caused / expected.std() < 0.05
    assert np.sqrt(((got - expected) ** 2).mean()) < 0.05 * caused
    rows = after.rows(1, 48)
    stepped = [*rows.feed(0, texts[0][:9]), *(rows.step([token])[0].copy() for token in texts[0][9:])]
    assert np.sqrt(((np.array(stepped) - expected) ** 2).mean()) < 0.05 * caused, "steps read what prompts do"


def test_tokens_in_the_cache_are_kept_exactly(tmp_path: Path) -> None:
    """They are a layer of digits: were one of them rounded, the model would look at another token than the last."""
    bundle = exported(tmp_path, **architectures()["tokens in the cache"])
    texts = np.random.default_rng(0).integers(3, 700, (9, 48)).tolist()
    _, after = with_int8(tmp_path / "int8", bundle, texts[1:])
    rows: Any = after.rows(1, 48)
    rows.feed(0, texts[0])
    digits = rows.cache[-1].numpy()[0, 0, :48].astype(int)
    assert (digits[:, 0] + 128 * digits[:, 1] + 16384 * digits[:, 2]).tolist() == texts[0]
    assert not digits[:, 3:].any()


def test_digits_that_int8_cannot_hold_are_refused() -> None:
    whole = np.array([[True, False]])
    assert cache._scales("x", np.array([[127.0, 254.0]], np.float32), whole).tolist() == [[1.0, 2.0]]
    with pytest.raises(InputError, match="`x` keeps whole numbers up to 255, which int8 cannot"):
        cache._scales("x", np.array([[255.0, 254.0]], np.float32), whole)
    with pytest.raises(InputError, match="`x` holds numbers that are not finite"):
        cache._scales("x", np.array([[np.nan, 254.0]], np.float32), whole)


# -- the engine -------------------------------------------------------------------------------------------------------


def prompts(bundle: Artifact) -> list[list[int]]:
    """Pieces of the learned text, of many lengths; some begin alike."""
    from llmctl.text.tokenizer import Tokenizer

    text = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "
    tokenizer = Tokenizer.load(bundle.path)
    return [tokenizer.encode((text * 2)[at : at + length]) for at in (0, 7, 30) for length in (3, 20, 21, 40)]


def answers(engine: Engine, requests: list[Request]) -> list[list[tuple[int, ...]]]:
    """The answers of every request, all submitted at once."""
    tickets = [engine.submit(request) for request in requests]
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    while engine.busy:
        for event in engine.step():
            assert event.error is None
            key = (event.ticket, event.choice)
            found[key] = (*found.get(key, ()), *event.tokens)
    return [[found[key] for key in sorted(found) if key[0] == ticket] for ticket in tickets]


SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=24),
    "drawn": Sampling(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=3),
    "beams": Sampling(max_new_tokens=12, beams=3),
    "several": Sampling(max_new_tokens=12, temperature=1.0, seed=5, n=3),
}


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("options", [{}, {"speculation": "prompt-lookup"}], ids=["plain", "speculating"])
def test_batches_and_kept_prefixes_answer_as_single_runs(
    bundle: Artifact, int8: OrtGenerator, kind: str, options: dict[str, Any]
) -> None:
    """The same tokens, with slots that are shared, left, taken over, exchanged, and saved to the pool."""
    sampling = SAMPLINGS[kind]
    asked = prompts(bundle)
    alone = [[tuple(one.ids) for one in int8.candidates(prompt, sampling)] for prompt in asked]
    engine = int8.engine(EngineOptions(slots=4, context=80, prefill_tokens=16, max_queue=64, **options))
    requests = [Request(prompt=prompt, sampling=sampling) for prompt in asked]
    try:
        assert answers(engine, requests) == alone
        assert answers(engine, requests[::-1]) == alone[::-1]
        assert engine.stats().cached_tokens > 100
    finally:
        engine.close()
