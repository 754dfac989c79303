"""What each artifact type asks for, against files written by the libraries that define them."""

import gzip
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmctl.store import types
from llmctl.store.types import Unfit
from llmctl.text.shards import ShardWriter


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 8}))
    tensors = {"a": np.zeros((3, 5), np.float32), "b": np.ones(7, np.float16), "c": np.zeros((), np.int64)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path, vocab_size=50, tokenizer="sha256:1", splits=("train", "validation")) as writer:
        writer.add("train", [0, 7, 1], bytes=5)
        writer.add("train", [0, 49, 1], bytes=5)
        writer.add("validation", [0, 1], bytes=2)
        writer.close()
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_tells_its_parameters(model):
    assert types.check("model.hf", model) == {
        "architecture": "LlamaForCausalLM",
        "parameters": 23,
        "dtype": "F16",
        "vocab_size": 8,
    }
    assert types.guess(model) == "model.hf"


def test_a_model_in_shards(model):
    save_file({"d": np.zeros(10, np.float32)}, model / "two.safetensors")
    (model / "model.safetensors").rename(model / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "d": "two.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert types.check("model.hf", model)["parameters"] == 33
    (model / "two.safetensors").unlink()
    with pytest.raises(Unfit, match="two.safetensors is missing"):
        types.check("model.hf", model)


@pytest.mark.parametrize("cut", [0, 4, 30, -1])
def test_a_truncated_model_is_found_without_reading_it(cut, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Unfit, match="model.safetensors is damaged"):
        types.check("model.hf", model)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32"}},
        [],
    ],
)
def test_a_wrong_header(header, model):
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(Unfit, match="model.safetensors is damaged"):
        types.check("model.hf", model)


def test_pickled_weights_are_named(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(Unfit, match=r"model.safetensors is missing \(pytorch_model.bin is not read"):
        types.check("model.hf", model)


def test_token_shards(shards):
    found = types.check_commit("dataset.tokens", shards, ["meta.json"])
    assert (found["vocab_size"], found["tokens.train"], found["tokens.validation"]) == (50, 6, 2)
    assert types.guess(shards) == "dataset.tokens"


def test_an_id_outside_the_vocabulary_is_found_at_commit(shards):
    edit(shards / "meta.json", vocab_size=49)
    types.check("dataset.tokens", shards)
    with pytest.raises(Unfit, match="train-00000.bin holds the id 49, the vocabulary has 49"):
        types.check_commit("dataset.tokens", shards, ["meta.json"])


def test_falling_offsets_are_found_at_commit(shards):
    (shards / "train-00000.idx").write_bytes(struct.pack("<3Q", 0, 7, 6))
    with pytest.raises(Unfit, match="offsets fall"):
        types.check_commit("dataset.tokens", shards, ["meta.json"])


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.idx"])
def test_shards_of_a_wrong_size(name, shards):
    path = shards / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Unfit, match=f"{name} has .* bytes, meta.json says"):
        types.check("dataset.tokens", shards)


CHAT = {"id": "1", "messages": [{"role": "user", "content": "hi"}]}
PAIR = {"prompt": [], "chosen": [], "rejected": []}


@pytest.mark.parametrize(
    ("row", "type"),
    [({"text": "x"}, "dataset.text"), (CHAT, "dataset.chat"), (PAIR, "dataset.preference"), ({"x": 1}, "files")],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_tell_their_type(row, type, suffix, tmp_path):
    data = (json.dumps(row) + "\n").encode()
    path = tmp_path / f"train{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert types.guess(path) == type
    assert types.guess(tmp_path) == type
    for wanted in types.COLUMNS:
        for place in (path, tmp_path):
            if wanted == type:
                assert types.check(wanted, place) == {}
            else:
                with pytest.raises(Unfit, match=r"has no column `(text|messages|prompt)`"):
                    types.check(wanted, place)


@pytest.mark.parametrize(("task", "columns"), types.LABELLED.items())
def test_labelled_rows_tell_their_task(task, columns, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"id": "1", **dict.fromkeys(columns, "x")}) + "\n")
    assert types.check("dataset.labelled", path) == types.check("dataset.labelled", tmp_path) == {"task": task}
    assert types.guess(path) == ("dataset.text" if "text" in columns else "dataset.labelled")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"format": "dataset.labelled"}))
    assert types.guess(tmp_path) == "dataset.labelled"
    path.write_text(json.dumps({"id": "1", columns[0]: "x"}) + "\n")
    with pytest.raises(Unfit, match="train.jsonl has the columns"):
        types.check("dataset.labelled", tmp_path)


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08broken", b"no json\n", b"[1]\n", b"\xff\xfe\n"])
def test_damaged_rows(content, tmp_path):
    name = "train.jsonl.gz" if content.startswith(b"\x1f") else "train.jsonl"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unfit, match=f"^{name} holds no JSON"):
        types.check("dataset.text", tmp_path)


def test_a_listed_file_must_be_there(tmp_path):
    info = {"format": "dataset.text", "splits": {"train": {"files": ["train-00000-of-00001.jsonl.gz"]}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(Unfit, match="though dataset_info.json lists it"):
        types.check("dataset.text", tmp_path)


@pytest.mark.parametrize(
    ("type", "files", "fault"),
    [
        ("model.hf", {}, "config.json is missing"),
        ("model.hf", {"config.json": "[]"}, "config.json holds no JSON object"),
        ("model.adapter", {"adapter_config.json": "{}"}, "adapter_model.safetensors is missing"),
        ("model.onnx", {"config.json": "{}"}, "model.onnx is missing"),
        ("model.onnx", {"config.json": "{}", "model.onnx": ""}, "model.onnx is empty"),
        ("model.onnx", {"config.json": "{}", "model.onnx": "x", "genai_config.json": "{"}, "genai_config.json is no"),
        ("tokenizer", {"tokenizer_config.json": "{}"}, "tokenizer.json is missing"),
        ("tokenizer", {"tokenizer.json": "{}"}, "tokenizer.json has no `model`"),
        ("dataset.tokens", {"meta.json": "{}"}, "dtype must be uint16 or uint32"),
        ("dataset.tokens", {"meta.json": '{"dtype": "uint16"}'}, "meta.json lacks vocab_size, tokenizer, splits"),
        ("dataset.text", {"readme.txt": "x"}, "no file named <split>.jsonl"),
        ("metrics", {"metrics.json": '{"a": [1]}'}, "`a` is no number"),
        ("metrics", {"metrics.json": "{}", "curves.jsonl": "x"}, "curves.jsonl holds no JSON Lines"),
        ("index.rag", {"index.json": "{}", "chunks.jsonl": ""}, "chunks.jsonl is empty"),
        ("deployment", {}, "receipt.json is missing"),
    ],
)
def test_what_is_missing_or_wrong(type, files, fault, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(Unfit, match=fault):
        types.check(type, tmp_path)


def test_a_directory_type_given_a_file(tmp_path):
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(Unfit, match="model.bin is a file, model.hf is a directory"):
        types.check("model.hf", tmp_path / "model.bin")


def test_types_of_plugins_pass():
    assert types.check("acme.thing", types.Path("/nowhere")) == {}


def test_rows_that_fit_two_types_are_of_the_one_that_is_welcome(tmp_path):
    """A labelled text is a text as well; only where both are welcome does the plainer one win."""
    path = tmp_path / "cls.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n')
    assert types.guess(path) == "dataset.text"
    assert types.guess(path, ("dataset.chat", "dataset.labelled")) == "dataset.labelled"
    assert types.guess(path, ("dataset.chat",)) == "dataset.text", "what it looks like is said in the refusal"
