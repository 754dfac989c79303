from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from llmctl import Artifact, InputError, StageError
from llmctl.generator import Sampling
from llmctl.ort import open_bundle
from llmctl.testing import StageResult, run_stage
from llmctl_export_onnx import EXPORT_ONNX
from llmctl_quantize import QUANTIZE
from llmctl_quantize.params import QuantizeParams
from llmctl_quantize.tables import METHODS

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")


def quantize(directory: Path, bundle: Artifact, data: Artifact | None = None, **params: Any) -> StageResult:
    return run_stage(QUANTIZE, directory, {"threads": 1, "speed_rounds": 1, **params}, model=bundle, data=data)


def load(bundle: Artifact) -> tuple[Any, dict[str, np.ndarray]]:
    model = onnx.load(bundle / "model.onnx")
    return model, {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The low nibble comes first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def dequantize(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, columns: int) -> np.ndarray:
    """`(N, K)` out of the layout of MatMulNBits; the zero point of symmetric weights is 2 ** (bits - 1)."""
    rows = values.shape[0]
    scales = scales.reshape(rows, -1)
    blocks = scales.shape[1]
    unpacked = unpack(values.reshape(rows, blocks, -1), bits).astype(np.float32)
    if zeros is None:
        zero = np.full((rows, blocks), 2 ** (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        zero = unpack(zeros.reshape(rows, -1), bits)[:, :blocks].astype(np.float32)
    else:
        zero = zeros.reshape(rows, blocks)
    return ((unpacked - zero[..., None]) * scales[..., None]).reshape(rows, -1)[:, :columns]


def products(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The dequantized matrix `(N, K)` of every MatMulNBits, by the output it makes."""
    made = {}
    reshaped = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Reshape"}
    for node in (node for node in model.graph.node if node.op_type == "MatMulNBits"):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        values = arrays[reshaped.get(node.input[1], node.input[1])]
        zeros = arrays[node.input[3]] if len(node.input) > 3 else None
        made[node.output[0]] = dequantize(values, arrays[node.input[2]], zeros, attributes["bits"], attributes["K"])
    return made


SETTINGS = {
    "int8": {"bits": 8},
    "int8 symmetric": {"bits": 8, "symmetric": True, "block_size": 32},
    "int4": {"bits": 4},
    "int4 symmetric": {"bits": 4, "symmetric": True},
    "int4 tables": {"bits": 4, "embedding_bits": 4},
    "int4 padded": {"bits": 4, "block_size": 128},
    "int4 nearest": {"bits": 4, "method": "rtn"},
    "int4 nearest symmetric": {"bits": 4, "method": "rtn", "symmetric": True},
    "int8 nearest": {"bits": 8, "method": "rtn"},
    "int8 nearest symmetric": {"bits": 8, "method": "rtn", "symmetric": True},
    "products only": {"bits": 8, "embedding_bits": 0},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_graph_computes_what_its_dequantized_weights_say(bundle: Artifact, tmp_path: Path, setting: str) -> None:
    """Put back as floats by our own unpacking, the weights give the same logits: nothing is packed wrong."""
    result = quantize(tmp_path, bundle, accuracy_level=0, **SETTINGS[setting])
    quantized, arrays = load(result.outputs["model"])
    original, floats = load(bundle)
    matrices = products(quantized, arrays)
    replaced = 0
    for node in original.graph.node:
        if node.op_type == "MatMul":
            floats[node.input[1]] = matrices[node.output[0]].T
            replaced += 1
        elif node.op_type == "FusedMatMul" and node.output[0] in matrices:
            floats[node.input[1]] = matrices[node.output[0]]  # the embedding reads the same table
            replaced += 1
    assert replaced == len(matrices)
    for tensor in original.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(floats[tensor.name]), tensor.name))
    reference = tmp_path / "reference"
    reference.mkdir()
    onnx.save(original, reference / "model.onnx")
    for name in ("config.json", "generation_config.json", "genai_config.json"):
        (reference / name).write_bytes((bundle / name).read_bytes())
    ids = np.random.default_rng(0).integers(0, 262, 60).tolist()
    expected = open_bundle(reference, "cpu", 1).logits(ids)
    got = open_bundle(result.outputs["model"].path, "cpu", 1).logits(ids)
    assert np.abs(got - expected).max() / expected.std() < 1e-5
    assert np.abs(expected - open_bundle(bundle.path, "cpu", 1).logits(ids)).max() > 1e-3, "rounding does something"


def test_the_products_are_quantized_and_a_tied_table_is_stored_once(bundle: Artifact, tmp_path: Path) -> None:
    result = quantize(tmp_path, bundle, bits=8)
    model, arrays = load(result.outputs["model"])
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["MatMulNBits"] == 2 * 6 + 1  # gate and up in one; heads of 24 are turned outside the operator
    assert operators["GatherBlockQuantized"] == 1
    assert operators["MatMul"] == operators["FusedMatMul"] == operators["Gather"] == 0
    tables = [a for a in arrays.values() if a.dtype == np.uint8 and a.shape[0] == 262 and a.size >= 262 * 96]
    assert len(tables) == 1
    # As small as the share says: a byte per weight, a float scale and a byte of zero point per block of 64.
    weights = sum(a.size for a in arrays.values() if a.dtype == np.uint8)
    bundle_path = result.outputs["model"].path
    assert result.metrics["bytes"] == sum(p.stat().st_size for p in bundle_path.glob("model.onnx*"))
    assert result.metrics["bytes"] < weights * (1 + 4 / 64) + 40_000
    assert result.metrics["bytes.ratio"] == result.metrics["bytes"] / result.metrics["bytes.before"]
    assert result.metrics["parameters"] == 262 * 96 + 2 * (96 * (96 + 48 + 48 + 96) + 3 * 96 * 160 + 2 * 96) + 96
    assert {p.name for p in bundle_path.iterdir()} == {p.name for p in bundle.path.iterdir()}
    assert len({p.stat().st_mode for p in bundle_path.iterdir()}) == 1, "all files are equally readable"


def test_symmetric_weights_need_no_zero_points(bundle: Artifact, tmp_path: Path) -> None:
    model, _ = load(quantize(tmp_path, bundle, symmetric=True).outputs["model"])
    assert {len(node.input) for node in model.graph.node if node.op_type == "MatMulNBits"} == {3}


@pytest.mark.parametrize(("level", "attribute"), [(0, None), (1, 1), (4, 4)])
def test_the_accuracy_level_reaches_every_product(
    bundle: Artifact, tmp_path: Path, level: int, attribute: int | None
) -> None:
    model, _ = load(quantize(tmp_path, bundle, accuracy_level=level).outputs["model"])
    found = {
        next((a.i for a in node.attribute if a.name == "accuracy_level"), None)
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }
    assert found == {attribute}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_search_is_closer_to_the_weights_than_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    """On Gaussian weights in blocks of 32. A step is 1 / sqrt(12) off on average; 32 draws span 4.14 deviations and
    their largest magnitude is 2.35 (order statistics)."""
    matrix = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    step = 2.35 / 2 ** (bits - 1) if symmetric else 4.14 / (2**bits - 1)
    errors = {}
    for name, method in METHODS.items():
        found = method(matrix, bits, 32, symmetric)
        back = dequantize(found.values, found.scales, found.zero_points, bits, 256)
        errors[name] = math.sqrt(((back - matrix) ** 2).mean())
    assert errors["rtn"] == pytest.approx(step / math.sqrt(12), rel=0.05)
    assert errors["search"] < errors["rtn"] * (0.98 if bits == 4 else 1.0001)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_block_of_zeros_or_of_one_value_is_exact(method: str, symmetric: bool) -> None:
    matrix = np.repeat(np.array([[0.0], [2.5], [-3.0]], np.float32), 40, axis=1)  # 40: a padded block too
    found = METHODS[method](matrix, 4, 32, symmetric)
    back = dequantize(found.values, found.scales, found.zero_points, 4, 40)
    assert np.abs(back - matrix).max() < 1e-6


def test_quality_is_measured_on_the_held_out_text(
    trained: Artifact, bundle: Artifact, tokens: Artifact, tmp_path: Path
) -> None:
    from llmctl.nn.hf import load_model
    from llmctl.text.shards import TokenShards

    result = quantize(tmp_path, bundle, tokens, bits=8)
    # Bits per byte of the original, computed by torch: one byte per token but for the two special ones.
    ids = TokenShards.open(tokens).split("validation").tokens.astype(np.int64)
    model, bits, size = load_model(trained.path).eval(), 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, 96):
            window = torch.from_numpy(ids[start : start + 96])
            nats = torch.nn.functional.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none")
            counted = window[1:] >= 6
            bits += nats[counted].sum().item() / math.log(2)
            size += int(counted.sum())
    assert result.metrics["tokens_compared"] == size
    assert result.metrics["bits_per_byte.before"] == pytest.approx(bits / size, rel=1e-5)
    assert 0.99 < result.metrics["bits_per_byte.ratio"] < 1.01
    assert result.metrics["top1_agreement"] > 0.97
    for name in ("decode.tokens_per_s", "decode.tokens_per_s.before", "decode.speedup"):
        assert result.metrics[name] > 0
    fewer = quantize(tmp_path / "fewer", bundle, tokens, bits=8, eval_tokens=64)
    assert fewer.metrics["tokens_compared"] < size


def test_a_model_that_became_too_much_worse_is_refused(bundle: Artifact, tokens: Artifact, tmp_path: Path) -> None:
    settings = {"bits": 4, "embedding_bits": 4, "block_size": 256, "symmetric": True}
    rise = quantize(tmp_path / "free", bundle, tokens, max_bits_per_byte_rise=10.0, **settings)
    assert rise.metrics["bits_per_byte.ratio"] > 1.001, "coarse enough to cost something"
    with pytest.raises(StageError, match=r"4 bits raise bits per byte by .*%, the budget is 0\.01%"):
        quantize(tmp_path / "strict", bundle, tokens, max_bits_per_byte_rise=1e-4, **settings)
    assert not list((tmp_path / "strict").rglob("*.onnx*"))
    assert json.loads((tmp_path / "strict" / "metrics" / "metrics.json").read_text())["bits_per_byte.ratio"] > 1.001


def test_conversations_count_what_the_assistant_says(trained: Artifact, bundle: Artifact, tmp_path: Path) -> None:
    answer = "the quick brown fox jumps over"
    row = {"id": "0", "messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    result = quantize(tmp_path / "out", bundle, Artifact(tmp_path / "chat.jsonl", "dataset.chat"), bits=8)
    assert result.metrics["tokens_compared"] == 30


def test_tokens_of_another_tokenizer_are_refused(bundle: Artifact, tmp_path: Path) -> None:
    from llmctl.text.shards import ShardWriter

    with ShardWriter(tmp_path / "tokens", vocab_size=262, tokenizer="sha256:0", splits=("validation",)) as writer:
        writer.add("validation", [7] * 100, 100)
    with pytest.raises(InputError, match="was made with another tokenizer"):
        quantize(tmp_path / "out", bundle, Artifact(tmp_path / "tokens", "dataset.tokens"))


def test_without_data_quality_is_said_to_be_unknown(bundle: Artifact, tmp_path: Path) -> None:
    result = quantize(tmp_path, bundle, bits=4)
    assert "bits_per_byte" not in result.metrics
    assert any(kind == "warning" and "was not measured" in event["text"] for kind, event in result.events)


def test_a_foreign_decoder_is_quantized(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97,
        n_positions=80,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    settings = {"exporter": "optimum", "task": "text-generation-with-past", "parity_prompts": 1, "threads": 1}
    model = run_stage(EXPORT_ONNX, tmp_path / "onnx", settings, model=Artifact(tmp_path / "hf", "model.hf"))
    result = quantize(tmp_path / "out", model.outputs["model"], bits=8, accuracy_level=0)
    operators = Counter(node.op_type for node in load(result.outputs["model"])[0].graph.node)
    assert operators["MatMulNBits"] == 2 * 4 + 1
    assert operators["Gemm"] == 0
    generators = [open_bundle(x.path, "cpu", 1) for x in (model.outputs["model"], result.outputs["model"])]
    before, after = (g.logits([5, 6, 7, 8]) for g in generators)
    assert 1e-5 < np.abs(before - after).max() < 0.1 * before.std()
    assert len(list(generators[1].stream([5, 6], Sampling(max_new_tokens=5)))) >= 1


def test_half_precision_is_refused_with_the_way_out(trained: Artifact, tmp_path: Path) -> None:
    params = {"dtype": "float16", "parity_prompts": 1, "threads": 1}
    half = run_stage(EXPORT_ONNX, tmp_path / "half", params, model=trained).outputs["model"]
    with pytest.raises(InputError, match="matrices are float16, and quantization starts from float32") as caught:
        quantize(tmp_path / "out", half)
    assert "export the model again with `dtype: float32`" in str(caught.value.hint)


def test_what_cannot_be_quantized_is_refused(bundle: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.onnx is missing"):
        quantize(tmp_path / "a", Artifact(tmp_path, "model.onnx"))
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="cannot be read"):
        quantize(tmp_path / "b", Artifact(tmp_path, "model.onnx"))
    once = quantize(tmp_path / "once", bundle).outputs["model"]
    with pytest.raises(InputError, match="has no product with a constant float matrix") as caught:
        quantize(tmp_path / "twice", once)
    assert caught.value.hint == "is it already quantized?"


def test_weights_with_several_hard_links_are_refused_with_the_way_out(bundle: Artifact, tmp_path: Path) -> None:
    """A bundle copied with `cp -al`: onnx reads none, ONNX Runtime does."""
    linked = Path(shutil.copytree(bundle.path, tmp_path / "linked"))
    links = Path(shutil.copytree(linked, tmp_path / "links", copy_function=os.link))
    with pytest.raises(
        InputError, match=r"links/model\.onnx cannot be read: .*model\.onnx\.data.* hard links"
    ) as caught:
        quantize(tmp_path / "out", Artifact(links, "model.onnx"))
    assert "\n" not in str(caught.value)
    assert caught.value.hint == (
        "the file has several hard links, as `cp -al` makes them: copy the bundle with `cp -r` instead"
    )
    found, expected = (open_bundle(path, "cpu", 1).logits([5, 6, 7]) for path in (links, bundle.path))
    assert np.array_equal(found, expected)
    copied = Path(shutil.copytree(links, tmp_path / "copied"))  # what the hint says
    quantize(tmp_path / "copied-out", Artifact(copied, "model.onnx"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 2}, "8 or 16"),
        ({"method": "gptq"}, "'auto', 'rtn' or 'search'"),
    ],
)
def test_settings_that_do_not_exist(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizeParams.model_validate(params)


def test_the_defaults_depend_on_the_bits() -> None:
    four, eight = QuantizeParams(bits=4), QuantizeParams(bits=8)
    assert (four.block, four.budget, four.rounding) == (32, 0.05, "search")
    assert (eight.block, eight.budget, eight.rounding) == (64, 0.01, "rtn")


def test_equal_bundles_give_equal_bytes_and_logging_stays_as_it_was(bundle: Artifact, tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    outputs = [quantize(tmp_path / name, bundle, bits=4, method="rtn").outputs["model"].path for name in "ab"]
    assert (root.level, list(root.handlers)) == before
    contents = [{p.name: p.read_bytes() for p in path.iterdir()} for path in outputs]
    assert contents[0] == contents[1]


def test_nothing_is_printed(bundle: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a stage prints on stdout is a reference in a pipe: nothing of ONNX Runtime's may get in between."""
    quantize(tmp_path, bundle, bits=4, method="rtn")
    assert capfd.readouterr().out == ""
