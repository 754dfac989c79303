"""Adapters beside exported decoders of every layout, through quantization, and what cannot be one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl import Artifact, InputError, StageError, UsageError
from llmctl.generator import Sampling
from llmctl.ort import open_bundle
from llmctl.ort.cache import KEEP
from llmctl.testing import StageResult, run_stage
from llmctl_export_onnx import EXPORT_ONNX
from llmctl_quantize import QUANTIZE

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "ort" / "models"))
import lora  # noqa: E402

PROMPT = [3, 50, 7, 7, 90, 11, 23]
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "vocab_size": 97,
    "max_position_embeddings": 80,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 80, "vocab_size": 97, "initializer_range": 0.1}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "llama": ("Llama", LLAMA, lora.LINEAR, {}),
    "untied head": ("Llama", {**LLAMA, "tie_word_embeddings": False}, ("q_proj", "lm_head"), {}),
    "biases": ("Qwen2", LLAMA, ("q_proj", "k_proj", "v_proj"), {}),
    "norms of queries and keys": ("Qwen3", {**LLAMA, "head_dim": 16}, ("q_proj", "k_proj", "gate_proj"), {}),
    "fused in the files": ("Phi3", LLAMA, ("qkv_proj", "gate_up_proj", "o_proj"), {}),
    "transposed": ("GPT2", GPT2, ("c_attn", "c_proj", "c_fc"), {"fan_in_fan_out": True}),
    "head by head": (
        "Bloom",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97, "seq_length": 80, "initializer_range": 0.1},
        ("query_key_value", "dense"),
        {},
    ),
}

OFTEN = ("llama", "fused in the files", "head by head")
"""Each of them takes two seconds; the others are slow tests."""


def save(directory: Path, family: str, config: dict[str, Any]) -> Artifact:
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**config, **IDS)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    getattr(transformers, name)(made).save_pretrained(directory)
    return Artifact(directory, "model.hf")


def export(directory: Path, model: Artifact, *adapters: Path, **params: Any) -> StageResult:
    found = [Artifact(path, "model.adapter") for path in adapters]
    return run_stage(EXPORT_ONNX, directory, {"parity_prompts": 2, "threads": 1, **params}, model=model, adapters=found)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return save(tmp_path_factory.mktemp("llama"), "Llama", LLAMA)


@pytest.fixture(scope="module")
def adapter(llama: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora.write_adapter(tmp_path_factory.mktemp("adapters") / "polite", llama.path, size=0.3)


@pytest.fixture(scope="module")
def exported(llama: Artifact, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    return export(tmp_path_factory.mktemp("exported"), llama, adapter)


@pytest.fixture
def damaged(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter for tests that change it."""
    return Path(shutil.copytree(adapter, tmp_path / "damaged"))


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_layout_of_weights(tmp_path: Path, name: str) -> None:
    family, config, targets, more = FAMILIES[name]
    model = save(tmp_path / "hf", family, config)
    adapter = lora.write_adapter(tmp_path / "a", model.path, targets, size=0.3, **more)
    result = export(tmp_path / "out", model, adapter)
    assert result.metrics["parity.adapters_max_abs_diff"] < 2e-5
    expected = lora.merged(model.path, adapter)(torch.tensor([PROMPT])).logits[0].detach().numpy()
    generator = open_bundle(result.outputs["model"].path, "cpu", 1)
    np.testing.assert_allclose(generator.with_adapter("a").logits(PROMPT), expected, atol=2e-5)
    assert np.abs(generator.logits(PROMPT) - expected).max() > 0.1  # control


def test_the_graph_of_an_export_without_adapters_is_what_it_was(llama: Artifact, exported: StageResult) -> None:
    """The nodes of the plain graph are all there, in their order; only products of adapters are new."""
    with_ = onnx.load(exported.outputs["model"] / "model.onnx", load_external_data=False).graph
    given = {value.name for value in with_.input} & {tensor.name for tensor in with_.initializer} - {KEEP}
    assert {name.rpartition(".")[2] for name in given} == {"weight", "lora_mask"}
    assert len(given) == 2 * 4 * 2 + 4  # A and B of qkv, out, gate_up and down in two layers, and a mask of each
    assert (
        exported.metrics["parameters"] == transformers.AutoModelForCausalLM.from_pretrained(llama.path).num_parameters()
    )


def test_the_exports_base_is_bit_for_bit_the_plain_one(tmp_path: Path, llama: Artifact, exported: StageResult) -> None:
    plain = export(tmp_path / "plain", llama)
    assert not (plain.outputs["model"].path / "adapters").exists()
    graph = onnx.load(plain.outputs["model"] / "model.onnx", load_external_data=False).graph
    assert {value.name for value in graph.input} & {tensor.name for tensor in graph.initializer} == {KEEP}
    one, other = (open_bundle(result.outputs["model"].path, "cpu", 1) for result in (plain, exported))
    assert np.array_equal(one.logits(PROMPT), other.logits(PROMPT))


def test_half_precision(tmp_path: Path, llama: Artifact, adapter: Path) -> None:
    result = export(tmp_path, llama, adapter, dtype="float16")
    expected = lora.merged(llama.path, adapter)(torch.tensor([PROMPT])).logits[0].detach().numpy()
    found = open_bundle(result.outputs["model"].path, "cpu", 1).with_adapter("polite").logits(PROMPT)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("params", "operator", "share"),
    [
        ({"bits": 8}, "MatMulNBits", 0.02),
        ({"bits": 4}, "MatMulNBits", 0.25),
        ({"activations": "dynamic"}, "MatMulInteger", 0.05),
    ],
    ids=["8", "4", "dynamic"],
)
def test_a_quantized_bundle_keeps_its_adapters(
    tmp_path: Path,
    llama: Artifact,
    adapter: Path,
    exported: StageResult,
    params: dict[str, Any],
    operator: str,
    share: float,
) -> None:
    """The adapted quantized model is nearer to the adapted model than to anything else, and its base to the base."""
    done = run_stage(QUANTIZE, tmp_path, {**params, "threads": 1, "speed_rounds": 1}, model=exported.outputs["model"])
    generator = open_bundle(done.outputs["model"].path, "cpu", 1)
    graph = onnx.load(done.outputs["model"] / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == operator for node in graph.node) == 2 * 4 + 1
    expected = lora.merged(llama.path, adapter)(torch.tensor([PROMPT])).logits[0].detach().numpy()
    base = transformers.AutoModelForCausalLM.from_pretrained(llama.path)(torch.tensor([PROMPT])).logits[0]
    base = base.detach().numpy()
    for found, right, wrong in (
        (generator.with_adapter("polite").logits(PROMPT), expected, base),
        (generator.logits(PROMPT), base, expected),
    ):
        assert np.abs(found - right).mean() < share * np.abs(right - wrong).mean()
    sampling = Sampling(max_new_tokens=8)
    assert len(list(generator.with_adapter("polite").stream(PROMPT, sampling))) > 0


def test_in_float16_both_are_what_an_export_is(
    exported: StageResult, llama: Artifact, adapter: Path, tmp_path: Path
) -> None:
    """Rounded by `quantize`, the graph and the adapter beside it answer bit for bit as those exported in float16."""
    params = {"bits": 16, "threads": 1, "speed_rounds": 1}
    done = run_stage(QUANTIZE, tmp_path / "half", params, model=exported.outputs["model"])
    half = export(tmp_path / "out", llama, adapter, dtype="float16")
    found, expected = (open_bundle(x.outputs["model"].path, "cpu", 1) for x in (done, half))
    for name in (None, "polite"):
        assert np.array_equal(found.with_adapter(name).logits(PROMPT), expected.with_adapter(name).logits(PROMPT))
    assert np.abs(found.logits(PROMPT) - found.with_adapter("polite").logits(PROMPT)).max() > 0.1  # control


def test_an_adapter_that_float16_cannot_hold_is_refused(llama: Artifact, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    planted = Path(shutil.copytree(adapter, tmp_path / "planted"))
    weights = load_file(planted / "adapter_model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("down_proj.lora_A.weight"))
    weights[name][1, 2] = 70_000
    save_file(weights, planted / "adapter_model.safetensors")
    single = export(tmp_path / "out", llama, planted, tolerance=1000).outputs["model"]
    with pytest.raises(InputError, match=r"`blocks.0.ffn.down.lora_A.weight` of `planted.onnx_adapter` holds 70000"):
        run_stage(QUANTIZE, tmp_path / "half", {"bits": 16, "threads": 1}, model=single)
    assert not (tmp_path / "half" / "model").exists()


@pytest.mark.slow
def test_names_are_given_or_those_of_the_directories(tmp_path: Path, llama: Artifact, adapter: Path) -> None:
    result = export(tmp_path / "out", llama, adapter, adapter, adapter_names=["one", "two"])
    assert open_bundle(result.outputs["model"].path, "cpu", 1).adapter_names == ("one", "two")
    for params, message in (
        ({}, "two adapters are called `polite`"),
        ({"adapter_names": ["one"]}, "adapter_names has 1 names, and there are 2 adapters"),
        ({"adapter_names": ["one", "a/b"]}, "an adapter cannot be called `a/b`"),
    ):
        with pytest.raises(UsageError, match=message):
            export(tmp_path / "refused", llama, adapter, adapter, **params)
    with pytest.raises(UsageError, match="`adapter_names` names the input `adapters`, and there is none"):
        export(tmp_path / "none", llama, adapter_names=["one"])
    with pytest.raises(UsageError, match="not through Optimum"):
        export(tmp_path / "optimum", llama, adapter, exporter="optimum")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "has use_dora, and only plain LoRA"),
        ({"bias": "all"}, "has bias all, and only plain LoRA"),
        ({"peft_type": "IA3"}, "has peft_type IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights pissa_niter_4"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    tmp_path: Path, llama: Artifact, damaged: Path, config: dict[str, Any], message: str
) -> None:
    path = damaged / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(InputError, match=message) as refused:
        export(tmp_path / "out", llama, damaged)
    assert "merge_and_unload" in str(refused.value.hint)


@pytest.mark.parametrize("config", [{"lora_alpha": None}, {"lora_alpha": "much"}, {"alpha_pattern": {"(": 2}}])
def test_a_scale_that_cannot_be_read_is_refused(
    tmp_path: Path, llama: Artifact, damaged: Path, config: dict[str, Any]
) -> None:
    path = damaged / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(InputError, match=r"adapter_config.json gives no scale for `model\.layers.*`, of rank 4: "):
        export(tmp_path / "out", llama, damaged)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, llama: Artifact, damaged: Path, adapter: Path) -> None:
    from safetensors.numpy import load_file, save_file

    wider = save(tmp_path / "wider", "Llama", {**LLAMA, "hidden_size": 128})
    with pytest.raises(InputError, match=r"is \[64, 4\] x \[4, 96\], the model's matrix is \[128, 96\]"):
        export(tmp_path / "a", wider, adapter)
    shallow = save(tmp_path / "shallow", "Llama", {**LLAMA, "num_hidden_layers": 1})
    with pytest.raises(InputError, match=r"changes `model\.layers\.1\..*`, and no matrix of the model is called so"):
        export(tmp_path / "b", shallow, adapter)
    config = json.loads((damaged / "adapter_config.json").read_text())
    said = {**config, "base_model_name_or_path": "sha256:" + "1" * 64}
    (damaged / "adapter_config.json").write_text(json.dumps(said))
    known = Artifact(llama.path, "model.hf", "sha256:" + "2" * 64)
    with pytest.raises(InputError, match=r"was trained on sha256:1{12}…, the model is sha256:2{12}…"):
        export(tmp_path / "c", known, damaged)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for change, message in (
        ({"base_model.model.model.norm.lora_A.weight": np.zeros((4, 64), np.float32)}, "only one of the two matrices"),
        ({"base_model.model.lm_head.weight": np.zeros((97, 64), np.float32)}, "is no LoRA matrix of a linear layer"),
    ):
        save_file({**tensors, **change}, damaged / "adapter_model.safetensors")
        (damaged / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            export(tmp_path / "d", llama, damaged)


def test_a_wrong_adapter_is_found_and_leaves_no_bundle(
    tmp_path: Path, llama: Artifact, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of the proof: one matrix of the written file is a tenth off."""
    from llmctl_export_onnx import lora as written

    arrays = written._arrays

    def wrong(*given):
        for number, (name, array) in enumerate(arrays(*given)):
            yield name, array * np.float32(1.1) if number == 3 else array

    monkeypatch.setattr(written, "_arrays", wrong)
    with pytest.raises(StageError, match="with the adapter `polite` the exported model's outputs differ by up to"):
        export(tmp_path, llama, adapter)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_an_adapter_that_was_never_trained_is_told(tmp_path: Path, llama: Artifact) -> None:
    fresh = lora.write_adapter(tmp_path / "fresh", llama.path, size=0)
    result = export(tmp_path / "out", llama, fresh)
    assert ("warning", "the adapter `fresh` changes nothing: its matrices B are all zero") in [
        (kind, fields.get("text")) for kind, fields in result.events
    ]
