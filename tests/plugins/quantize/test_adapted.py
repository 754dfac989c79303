"""Bundles with adapters: what is learned from text covers each of them, and so does the judgement."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl import Artifact, StageError
from llmctl.ort import open_bundle
from llmctl.testing import StageResult, run_stage
from llmctl_export_onnx import EXPORT_ONNX
from llmctl_quantize import QUANTIZE, cache, ranges

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "ort" / "models"))
import lora  # noqa: E402

WINDOW = 96


@pytest.fixture(scope="module")
def adapter(trained: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that makes keys and values larger than the model alone ever does."""
    targets = ("k_proj", "v_proj", "down_proj")
    return lora.write_adapter(tmp_path_factory.mktemp("adapters") / "loud", trained.path, targets, size=0.6)


@pytest.fixture(scope="module")
def merged(trained: Artifact, adapter: Path) -> Any:
    return lora.merged(trained.path, adapter)


@pytest.fixture(scope="module")
def adapted(trained: Artifact, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    found = [Artifact(adapter, "model.adapter")]
    settings = {"parity_prompts": 2, "threads": 1}
    directory = tmp_path_factory.mktemp("adapted")
    return run_stage(EXPORT_ONNX, directory, settings, model=trained, adapters=found).outputs["model"]


def quantize(directory: Path, bundle: Artifact, data: Artifact, **params: Any) -> StageResult:
    settings = {"threads": 1, "speed_rounds": 1, **params}
    return run_stage(QUANTIZE, directory, settings, model=bundle, data=data)


def texts(tokens: Artifact) -> list[list[int]]:
    from llmctl.text.shards import TokenShards

    ids = TokenShards.open(tokens).split("train").tokens.tolist()
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW)]


def reach(model: Any, tokens: Artifact) -> dict[str, np.ndarray]:
    """The largest magnitude of each channel in the cache of transformers' model."""
    largest: dict[str, np.ndarray] = {}
    for ids in texts(tokens):
        with torch.no_grad():
            layers = model(torch.tensor([ids]), use_cache=True).past_key_values.layers
        for number, layer in enumerate(layers):
            for kind, value in (("key", layer.keys), ("value", layer.values)):
                name, found = f"past_key_values.{number}.{kind}", value[0].abs().amax(dim=1).numpy()
                largest[name] = np.maximum(found, largest.get(name, 0))
    return largest


def test_a_caches_scales_reach_as_far_as_any_adapter(
    trained: Artifact, merged: Any, adapted: Artifact, tokens: Artifact, tmp_path: Path
) -> None:
    alone = reach(transformers.AutoModelForCausalLM.from_pretrained(trained.path).eval(), tokens)
    louder = reach(merged, tokens)
    assert any((louder[name] > 2 * alone[name]).any() for name in alone), "control: the model alone is quieter"
    assert any((louder[name] < alone[name]).any() for name in alone)
    result = quantize(tmp_path, adapted, tokens, bits=0, kv_cache_dtype="int8")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in load(result.outputs["model"]).graph.initializer}
    for name in alone:
        expected = np.maximum(alone[name], louder[name]).reshape(-1) / 127
        np.testing.assert_allclose(arrays[f"{name}_scale"], expected, rtol=1e-3)
    for prefix in ("", "adapters.loud."):
        assert result.metrics[f"{prefix}bits_per_byte.ratio"] == pytest.approx(1, abs=5e-3)
        assert result.metrics[f"{prefix}top1_agreement"] > 0.98


def load(bundle: Artifact) -> Any:
    return onnx.load(bundle / "model.onnx")


def test_each_answers_with_the_cache_as_the_merged_model(
    merged: Any, adapted: Artifact, tokens: Artifact, tmp_path: Path
) -> None:
    ids = texts(tokens)[0]
    with torch.no_grad():
        expected = merged(torch.tensor([ids])).logits[0].numpy()
    result = quantize(tmp_path, adapted, tokens, bits=0, kv_cache_dtype="int8")
    found = open_bundle(result.outputs["model"].path, "cpu", 1)
    away, other = (np.abs(found.with_adapter(name).logits(ids) - expected).mean() for name in ("loud", None))
    assert away < 0.05 < 10 * away < other


def test_a_cache_that_an_adapter_leaves_is_refused(
    adapted: Artifact, tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with the scales of the model alone the adapter's keys are cut off, and its loss says so."""
    right = cache.calibrate

    def alone(generator: Any, *given: Any) -> dict[str, np.ndarray]:
        with monkeypatch.context() as patch:
            patch.setattr(type(generator), "adapter_names", ())
            return right(generator, *given)

    monkeypatch.setattr(cache, "calibrate", alone)
    asked = {"bits": 0, "kv_cache_dtype": "int8", "min_top1_agreement": 0.98}
    with pytest.raises(StageError, match=r"leaves top-1 agreement at [\d.]+% with the adapter `loud`, at least 98"):
        quantize(tmp_path, adapted, tokens, **asked)
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_integer_products_are_judged_with_each(
    adapted: Artifact, tokens: Artifact, tmp_path: Path, activations: str
) -> None:
    loose = {"max_bits_per_byte_rise": 1.0, "min_top1_agreement": 0.0}
    result = quantize(tmp_path, adapted, tokens, bits=8, activations=activations, **loose)
    for prefix in ("", "adapters.loud."):
        assert 0.97 < result.metrics[f"{prefix}bits_per_byte.ratio"] < 1.05
    with pytest.raises(StageError, match="at least 100.00% is asked"):
        quantize(tmp_path / "b", adapted, tokens, bits=8, activations=activations, min_top1_agreement=1.0)


@pytest.mark.slow
def test_ranges_are_those_of_the_model_and_of_the_merged_one(
    trained: Artifact, bundle: Artifact, merged: Any, adapted: Artifact, tokens: Artifact, tmp_path: Path
) -> None:
    """Against the ranges of two plain exports, product by product."""
    merged.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (tmp_path / "merged" / name).write_bytes((trained.path / name).read_bytes())
    settings = {"parity_prompts": 1, "threads": 1}
    other = run_stage(EXPORT_ONNX, tmp_path, settings, model=Artifact(tmp_path / "merged", "model.hf"))
    feeds = open_bundle(adapted.path, "cpu", 1).with_adapter("loud").adapter_feeds
    read, some = texts(tokens), lambda *_: None
    found = ranges.read(load(adapted), read, tmp_path, 1, some, ({}, feeds))
    apart = [ranges.read(load(one), read, tmp_path, 1, some) for one in (bundle, other.outputs["model"])]
    assert len(found) == len(apart[0]) == len(apart[1])
    louder = 0
    for whole, one, two in zip(found.values(), *(each.values() for each in apart), strict=True):
        np.testing.assert_allclose(whole[0], np.minimum(one[0], two[0]), atol=1e-4)
        np.testing.assert_allclose(whole[1], np.maximum(one[1], two[1]), atol=1e-4)
        louder += (two[1] > one[1] + 1e-3).any()
    assert louder, "control: the adapter reaches further"
