from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl import Artifact, InputError, StageError, UsageError
from llmctl.generator import Sampling
from llmctl.ort import open_bundle, open_encoder
from llmctl.testing import StageResult, run_stage
from llmctl.text.pooling import write_pooling
from llmctl_export_onnx import EXPORT_ONNX

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama tied": {"arch": "llama", "kv_heads": 2},
    "llama untied": {"arch": "llama", "kv_heads": 1, "tie_embeddings": False},
    "qwen3": {"arch": "qwen3", "kv_heads": 2},
    "gpt2": {"arch": "gpt2"},
    "rotated outside": {"arch": "llama", "dim": 48, "heads": 2, "kv_heads": 1},  # head width 24
    "padded heads": {"arch": "llama", "dim": 40, "heads": 4},  # head width 10
}


def rarely(*names: str) -> list[Any]:
    """The families, those of these names marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in names else name for name in FAMILIES]


def save(directory: Path, **changes: Any) -> Artifact:
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    shape = {"vocab_size": 97, "dim": 64, "layers": 2, "heads": 4, "context": 80, "bos_id": 0, "eos_id": 1, "pad_id": 2}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # no two norms alike, biases not 0
            parameter += torch.randn_like(parameter) * 0.05
    save_model(model, directory)
    return Artifact(directory, "model.hf")


def export(directory: Path, model: Artifact, data: Artifact | None = None, **params: Any) -> StageResult:
    return run_stage(EXPORT_ONNX, directory, {"parity_prompts": 3, "threads": 1, **params}, model=model, data=data)


def graph(result: StageResult) -> Any:
    return onnx.load(result.outputs["model"] / "model.onnx")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return save(tmp_path_factory.mktemp("llama"), arch="llama", kv_heads=2)


@pytest.fixture(scope="module")
def exported(llama: Artifact, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    return export(tmp_path_factory.mktemp("exported"), llama, parity_prompts=20)


@pytest.mark.parametrize("family", rarely("rotated outside", "padded heads"))
def test_every_family_gives_one_fused_attention_per_layer_and_each_weight_once(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = save(tmp_path / "hf", **FAMILIES[family])
    result = export(tmp_path / "out", model)
    assert result.metrics["gqa_nodes"] == result.metrics["layers"] == 2
    assert result.metrics["parity.max_abs_diff"] < 1e-5
    assert result.metrics["parity.greedy_equal"] == result.metrics["parity.prompts"] == 3
    found = graph(result)
    operators = Counter(node.op_type for node in found.graph.node)
    assert operators["GroupQueryAttention"] == 2
    assert not {"Softmax", "Attention", "Transpose", "ScatterND", "Where"} & set(operators)
    # Counted from the file, against transformers' own count.
    hf = AutoModelForCausalLM.from_pretrained(model.path)
    named = [t for t in found.graph.initializer if t.name.endswith((".weight", ".bias"))]
    weights = sum(int(np.prod(t.dims)) for t in named)
    assert weights == hf.num_parameters() == result.metrics["parameters"]
    # The rest of the file is rotary tables and the graph, which is small: no exporter's notes are left in it.
    rest = {t.name: int(np.prod(t.dims)) for t in found.graph.initializer if t not in named}
    assert sum(size for name, size in rest.items() if not name.endswith("_cache")) < 100
    assert (result.outputs["model"] / "model.onnx").stat().st_size < 30_000
    assert result.metrics["bytes"] == sum(p.stat().st_size for p in result.outputs["model"].path.glob("model.onnx*"))


@pytest.mark.parametrize("family", ["llama tied", pytest.param("llama untied", marks=pytest.mark.slow), "capped"])
def test_logits_of_the_last_tokens_alone(tmp_path: Path, family: str) -> None:
    import onnxruntime as ort

    traits = {**FAMILIES, "capped": {"arch": "gemma2", "kv_heads": 2, "head_dim": 16}}[family]
    found = export(tmp_path / "out", save(tmp_path / "hf", **traits)).outputs["model"]
    session = ort.InferenceSession(str(found / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_overridable_initializers()] == [
        ("num_logits_to_keep", [1])
    ]
    feeds = {"input_ids": np.array([[3, 50, 7, 7, 90]] * 2), "attention_mask": np.ones((2, 5), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    (every,) = session.run(["logits"], feeds)
    assert every.shape == (2, 5, 97)
    for kept, rows in ((0, 5), (1, 1), (3, 3), (5, 5), (9, 5)):
        (last,) = session.run(["logits"], {**feeds, "num_logits_to_keep": np.array([kept])})
        assert last.shape == (2, rows, 97)
        np.testing.assert_allclose(last, every[:, -rows:], atol=1e-5)


def test_the_bundle_answers_as_transformers(exported: StageResult, llama: Artifact) -> None:
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(llama.path).eval()
    generator = open_bundle(exported.outputs["model"].path, "cpu", 1)
    prompt = [3, 50, 7, 7, 90]
    expected = hf.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, 5:].tolist()
    answer = list(generator.stream(prompt, Sampling(max_new_tokens=60)))
    assert answer == [token for token in expected if token != 1]
    assert exported.metrics["parity.greedy_equal"] == 20


def test_the_bundle_holds_what_other_tools_read(exported: StageResult, llama: Artifact) -> None:
    bundle = exported.outputs["model"].path
    assert (bundle / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    assert (bundle / "generation_config.json").is_file()
    genai = json.loads((bundle / "genai_config.json").read_text())
    inputs = {value.name: value for value in graph(exported).graph.input}
    decoder = genai["model"]["decoder"]
    assert set(inputs) == {"input_ids", "attention_mask", "num_logits_to_keep"} | {
        decoder["inputs"][name] % layer for name in ("past_key_names", "past_value_names") for layer in range(2)
    }
    dims = [d.dim_param or d.dim_value for d in inputs["past_key_values.0.key"].type.tensor_type.shape.dim]
    assert dims == ["batch_size", decoder["num_key_value_heads"], "past_sequence_length", decoder["head_size"]]
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 80
    assert genai["search"]["past_present_share_buffer"] is True


def test_optimum_loads_the_bundle(exported: StageResult, llama: Artifact) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(exported.outputs["model"].path, provider="CPUExecutionProvider")
    prompt = [3, 50, 7, 7, 90]
    out = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    generator = open_bundle(exported.outputs["model"].path, "cpu", 1)
    assert [token for token in out if token != 1] == list(generator.stream(prompt, Sampling(max_new_tokens=20)))


def test_equal_models_give_equal_bytes(exported: StageResult, llama: Artifact, tmp_path: Path) -> None:
    again = export(tmp_path, llama)
    digests = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in result.outputs["model"].path.iterdir()}
        for result in (exported, again)
    ]
    assert digests[0] == digests[1]


def test_a_graph_with_one_layer_a_hundredth_off_is_refused(
    llama: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmctl_export_onnx import decoder, graph

    trace = decoder.trace

    def sabotage(model: Any, opset: int) -> Any:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.blocks[1].ffn.down.weight *= 1.01
        return trace(model, opset)

    monkeypatch.setattr(decoder, "trace", sabotage)
    monkeypatch.setattr(graph, "account_weights", lambda *_: None)
    with pytest.raises(StageError, match="outputs differ by up to"):
        export(tmp_path, llama)
    assert not list(tmp_path.rglob("model.onnx*")), "no model is left behind"


def test_other_greedy_tokens_are_refused_whatever_the_tolerance(
    llama: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmctl_export_onnx import parity

    step = parity.InPlaceRows.step
    monkeypatch.setattr(parity.InPlaceRows, "step", lambda rows, tokens: np.roll(step(rows, tokens), 1))
    with pytest.raises(StageError, match="3 of 3 prompts give other greedy tokens"):
        export(tmp_path, llama, tolerance=1e6)


def test_a_difference_that_is_not_a_number_is_refused() -> None:
    from llmctl_export_onnx.parity import Allowance, Differences, Parity

    for value in (0.0, float("nan")):
        found = Differences(Allowance(1e-4))
        for name, difference in (("prefill", 0.0), ("cached", value), ("ragged", 0.0)):
            found.add(name, np.full(3, difference), np.zeros(3))
        parity = Parity(found.largest, found.excess, 1, 1)
        assert np.isnan(parity.max_abs_diff) == np.isnan(value)
        if value == 0.0:
            parity.check(1e-4)
        else:
            with pytest.raises(StageError, match=r"differ by up to nan \(cached\)"):
                parity.check(1e-4)


def test_a_weight_stored_twice_or_lost_is_noticed(llama: Artifact) -> None:
    import onnx_ir as ir

    from llmctl.nn.hf import load_model
    from llmctl_export_onnx import decoder, graph

    model = load_model(llama.path)
    model.backend = "onnx"
    weight = model.blocks[0].ffn.up.weight.detach().numpy()
    found = decoder.trace(model, 23)
    graph.account_weights([found], model)
    copy = ir.Value(name="copy", const_value=ir.tensor(np.ascontiguousarray(weight.T), name="copy"))
    found.graph.register_initializer(copy)
    with pytest.raises(StageError, match=r"holds the weight blocks\.0\.ffn\.up\.weight 2 times"):
        graph.account_weights([found], model)
    del found.graph.initializers["copy"], found.graph.initializers["blocks.0.ffn.up.weight"]
    with pytest.raises(StageError, match="0 times"):
        graph.account_weights([found], model)


def test_prompts_come_from_the_data(tmp_path: Path, exported: StageResult) -> None:
    from llmctl.text.shards import ShardWriter
    from llmctl_export_onnx.prompts import draw

    with ShardWriter(tmp_path, vocab_size=97, tokenizer="sha256:0", splits=("train", "validation")) as writer:
        writer.add("train", [5] * 200, 200)
        writer.add("validation", [6] * 200, 200)
    data = Artifact(tmp_path, "dataset.tokens")
    first, *others = draw(data, tmp_path, 97, 16, 5, seed=0)
    assert len(first) == 16
    assert len(others) == 4
    assert {token for prompt in others for token in prompt} == {6}
    assert draw(None, tmp_path, 97, 16, 5, seed=0) == draw(None, tmp_path, 97, 16, 5, seed=0)
    assert draw(None, tmp_path, 97, 16, 5, seed=0) != draw(None, tmp_path, 97, 16, 5, seed=1)
    with pytest.raises(InputError, match="a vocabulary of 97, the model one of 96"):
        draw(data, tmp_path, 96, 16, 5, seed=0)


@pytest.mark.parametrize("filled", ["train", "test", "neither"])
@pytest.mark.parametrize("limit", [1, 4, 32])
def test_prompts_where_the_held_out_split_is_empty(tmp_path: Path, filled: str, limit: int) -> None:
    from llmctl.text.shards import ShardWriter
    from llmctl_export_onnx.prompts import draw

    with ShardWriter(tmp_path, vocab_size=97, tokenizer="sha256:0", splits=("train", "test", "validation")) as writer:
        if filled != "neither":
            writer.add(filled, [5, 5, 5], 3)
    first, *others = draw(Artifact(tmp_path, "dataset.tokens"), tmp_path, 97, limit, 4, seed=0)
    assert len(first) == limit
    assert [1 <= len(prompt) <= limit for prompt in others] == [True] * 3
    assert ({token for prompt in others for token in prompt} == {5}) == (filled != "neither")


def test_prompts_from_conversations_without_a_held_out_one(tmp_path: Path, model_dir: Path) -> None:
    from llmctl.text.datasets import DatasetWriter
    from llmctl.text.tokenizer import Tokenizer
    from llmctl_export_onnx.prompts import draw

    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    with DatasetWriter(tmp_path / "chat", "dataset.chat", ("train", "validation")) as writer:
        writer.add("train", {"id": "1", "messages": messages})
    _, asked, *_ = draw(Artifact(tmp_path / "chat", "dataset.chat"), model_dir, 262, 32, 3, seed=0)
    assert asked == Tokenizer.load(model_dir).encode_chat(messages[:1], add_generation_prompt=True).ids


@pytest.mark.parametrize("context", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_the_smallest_contexts_are_exported(tmp_path: Path, context: int) -> None:
    from llmctl.text.shards import ShardWriter

    directory = tmp_path / "tokens"
    with ShardWriter(directory, vocab_size=97, tokenizer="sha256:0", splits=("train", "validation")) as writer:
        writer.add("train", [5, 6, 7], 3)
    model = save(tmp_path / "model", arch="llama", kv_heads=2, context=context)
    result = export(tmp_path / "bundle", model, Artifact(directory, "dataset.tokens"))
    assert result.metrics["parity.max_abs_diff"] < 1e-5
    assert result.metrics["parity.greedy_equal"] == 3


@pytest.mark.slow
def test_the_operator_set_can_be_chosen(llama: Artifact, tmp_path: Path) -> None:
    result = export(tmp_path, llama, opset=21)
    assert {o.domain: o.version for o in graph(result).opset_import} == {"": 21, "com.microsoft": 1}
    assert result.metrics["parity.max_abs_diff"] < 1e-5


def neox(directory: Path) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=80,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def test_another_decoder_goes_through_optimum(tmp_path: Path) -> None:
    model = neox(tmp_path / "hf")
    result = export(tmp_path / "out", Artifact(tmp_path / "hf", "model.hf"))
    assert result.metrics["parity.max_abs_diff"] < 1e-4
    assert result.metrics["parity.greedy_equal"] == 3
    assert result.metrics["parameters"] == model.num_parameters()
    generator = open_bundle(result.outputs["model"].path, "cpu", 1)
    prompts = [[3, 50, 7, 7, 90], [11]]
    for prompt, answer in zip(prompts, generator.generate(prompts, Sampling(max_new_tokens=30)), strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=1)
        assert answer == [token for token in out[0, len(prompt) :].tolist() if token != 1]
    # The control: the proof looks at this path too.
    with pytest.raises(StageError, match="outputs differ"):
        export(tmp_path / "strict", Artifact(tmp_path / "hf", "model.hf"), tolerance=1e-12)
    assert not list((tmp_path / "strict").rglob("*.onnx"))


def test_another_encoder_goes_through_optimum(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=97,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    model = AlbertModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    write_pooling(tmp_path / "hf", "cls", 32, 40, normalise=False)
    # Where this file is, Optimum would look for the library that wrote it.
    (tmp_path / "hf" / "config_sentence_transformers.json").write_text("{}")
    result = export(tmp_path / "out", Artifact(tmp_path / "hf", "model.hf"))
    assert result.metrics["parity.last_hidden_state_max_abs_diff"] < 1e-4
    encoder = open_encoder(result.outputs["model"].path, "cpu", 1)
    rows = [[5, 6, 7], [8, 9]]
    found = encoder.run(rows)["last_hidden_state"]
    for row, states in zip(rows, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([row])).last_hidden_state[0].numpy()
        assert np.abs(states[: len(row)] - expected).max() < 1e-5
    assert np.array_equal(encoder.embed(rows), found[:, 0])  # as the model's directory says
    with pytest.raises(UsageError, match="`pooling: mean` is not available through Optimum"):
        export(tmp_path / "asked", Artifact(tmp_path / "hf", "model.hf"), pooling="mean")
    with pytest.raises(InputError, match="is no decoder that generates text"):
        open_bundle(result.outputs["model"].path, "cpu", 1)


@pytest.mark.slow
def test_another_encoder_decoder_goes_through_optimum(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=97,
        d_model=32,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=60,
        init_std=0.2,
        **sizes,
    )
    model = BartForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "hf")
    result = export(tmp_path / "out", Artifact(tmp_path / "hf", "model.hf"))
    assert result.metrics["parity.max_abs_diff"] < 1e-4
    assert result.metrics["parity.greedy_equal"] == 3
    with pytest.raises(StageError, match="outputs differ"):
        export(tmp_path / "strict", Artifact(tmp_path / "hf", "model.hf"), tolerance=1e-12)
    with pytest.raises(UsageError, match="`dtype: float16` is not available through Optimum"):
        export(tmp_path / "half", Artifact(tmp_path / "hf", "model.hf"), dtype="float16")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("GPTNeoXForCausalLM", "text-generation-with-past"),
        ("BertForMaskedLM", "fill-mask"),
        ("RobertaForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("BertModel", "feature-extraction"),
        ("BartForConditionalGeneration", "text2text-generation-with-past"),
        ("MarianMTModel", "text2text-generation-with-past"),
    ],
)
def test_the_task_follows_from_the_architecture(architecture: str, task: str) -> None:
    from llmctl_export_onnx.foreign import choose_task

    assert choose_task({"architectures": [architecture]}) == task


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json is missing"),
        ("{", "config.json is no valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"architectures": ["WhisperSomething"]}', "none of them tells what to export"),
        ('{"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}', "Optimum cannot export"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, config: str | None, message: str) -> None:
    (tmp_path / "hf").mkdir()
    if config is not None:
        (tmp_path / "hf" / "config.json").write_text(config)
    with pytest.raises(InputError, match=message) as caught:
        export(tmp_path / "out", Artifact(tmp_path / "hf", "model.hf"))
    assert "\n" not in caught.value.message


def test_native_can_be_insisted_on(tmp_path: Path) -> None:
    neox(tmp_path / "hf")
    with pytest.raises(InputError, match="GPTNeoXForCausalLM"):
        export(tmp_path / "out", Artifact(tmp_path / "hf", "model.hf"), exporter="native")


def test_our_own_model_can_go_through_optimum(llama: Artifact, tmp_path: Path) -> None:
    result = export(tmp_path, llama, exporter="optimum", task="text-generation-with-past")
    assert result.metrics["parity.greedy_equal"] == 3
    assert json.loads((result.outputs["model"] / "genai_config.json").read_text())["search"] != {}
    assert open_bundle(result.outputs["model"].path, "cpu", 1).in_place is False


GENAI = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
for prompt in json.loads(sys.argv[2]):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 40, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps([int(token) for token in generator.get_sequence(0)][len(prompt):]))
"""


@pytest.fixture(scope="session")
def genai_python() -> Path:
    """An environment of its own: onnxruntime-genai needs onnxruntime, which must not stand beside onnxruntime-gpu."""
    home = Path.home() / ".cache" / "llmctl-tests" / "genai-0.18.0"
    python = home / "bin" / "python"
    if not (home / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        packages = ["onnxruntime-genai==0.18.0", "onnxruntime==1.31.1"]
        done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot install onnxruntime-genai: {done.stderr.strip().splitlines()[-1]}")
        (home / "ready").touch()
    return python


WIDER: dict[str, dict[str, Any]] = {
    "gpt3": {"arch": "gpt3", "pattern": "LS", "window": 6},
    "gopher": {"arch": "gopher"},
    "bloom": {"arch": "bloom"},
    "gemma3": {"arch": "gemma3", "pattern": "SL", "window": 6, "local_rope_theta": 100.0, "rope_theta": 1e6},
}
"""Biases, windows and two rotary tables, which onnxruntime-genai leaves to the graph."""


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *WIDER])
def test_onnxruntime_genai_gives_the_same_greedy_tokens(genai_python: Path, tmp_path: Path, family: str) -> None:
    bundle = export(tmp_path / "out", save(tmp_path / "hf", **{**FAMILIES, **WIDER}[family])).outputs["model"].path
    prompts = [[3, 50, 7, 7, 90], [11], list(range(2, 32))]
    command = [genai_python, "-c", GENAI, bundle, json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    generator = open_bundle(bundle, "cpu", 1)
    for prompt, line in zip(prompts, done.stdout.splitlines(), strict=True):
        answer = list(generator.stream(prompt, Sampling(max_new_tokens=40)))
        assert [token for token in json.loads(line) if token != 1] == answer


def test_projections_and_sums_with_their_norms_are_fused(exported: StageResult, llama: Artifact) -> None:
    from llmctl.nn.hf import load_model

    found = graph(exported)
    operators = Counter(node.op_type for node in found.graph.node)
    # Per layer: queries, keys and values; the way out; gate and up; down. The head is tied.
    assert operators["MatMul"] == 2 * 4
    assert operators["SkipSimplifiedLayerNormalization"] == 2 * 2
    assert operators["RMSNormalization"] == 1
    assert operators["Add"] == 0
    attentions = [node for node in found.graph.node if node.op_type == "GroupQueryAttention"]
    assert all(node.input[0] and not node.input[1] and not node.input[2] for node in attentions)
    model = load_model(llama.path)
    weights = {tensor.name: tensor for tensor in onnx.load(exported.outputs["model"] / "model.onnx").graph.initializer}
    attention = model.blocks[1].attention
    joined = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]).T.detach().numpy()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(weights["blocks.1.attention.qkv.weight"]), joined)
