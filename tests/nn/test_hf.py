"""Hugging Face directories: byte-equal round trips, every tensor accounted for, damaged input named."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmctl.errors import InputError, StageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.hf import load_config, load_model, save_model
from llmctl.nn.transformer import Transformer

from .conftest import FAMILIES, VOCAB, random_hf


@pytest.fixture
def copy(hf_directory, tmp_path) -> Path:
    """A GQA Llama's directory that a test may damage."""
    return Path(shutil.copytree(hf_directory("llama-gqa"), tmp_path / "model"))


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_read_write_read_is_byte_equal(name, hf_directory, tmp_path):
    source = hf_directory(name)
    save_model(load_model(source), tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    weights = (source / "model.safetensors").read_bytes()  # as transformers wrote it
    assert weights == (tmp_path / "a" / "model.safetensors").read_bytes()
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_tied_head_is_stored_once(name, hf_directory, tmp_path):
    save_model(load_model(hf_directory(name)), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118  # not a dict
        assert file.metadata() == {"format": "pt"}
    assert sum(VOCAB in shape for shape in shapes) == 1


def test_bfloat16_is_kept_on_request(copy, tmp_path):
    model = load_model(copy).bfloat16()
    save_model(model, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path / "half").embedding.weight.dtype == torch.float32
    kept = load_model(tmp_path / "half", dtype=None)
    assert kept.embedding.weight.dtype == torch.bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == torch.bfloat16


def test_generation_config(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(arch="llama", vocab_size=20, dim=16, layers=1, heads=2, bos_id=0, eos_id=1, pad_id=2)
    save_model(Transformer(config), tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    # Further ids that end a text survive, wherever they were listed.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert load_config(tmp_path).eos_ids == {1, 7}
    save_model(load_model(tmp_path), tmp_path / "again")
    assert load_config(tmp_path / "again").eos_ids == {1, 7}


def test_tokenizer_files_go_along(tmp_path, copy):
    source = tmp_path / "tokenizer"
    source.mkdir()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_word_tokenizer(), eos_token="<e>")
    tokenizer.save_pretrained(source)
    save_model(load_model(copy), tmp_path / "out", source)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("a b")["input_ids"] == tokenizer("a b")["input_ids"]


def _word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<e>": 0, "a": 1, "b": 2}, unk_token="<e>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
def test_shards_are_read_through_their_index(name, tmp_path):
    theirs = random_hf(name)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(InputError, match="model-00002-of-.* is missing, though the index names it"):
        load_model(tmp_path)


def test_old_gpt2_checkpoints_without_prefix_and_with_mask_buffers(hf_directory, tmp_path):
    """The names of the original `gpt2` on the Hub."""
    shutil.copytree(hf_directory("gpt2"), tmp_path, dirs_exist_ok=True)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(tmp_path, strip)
    expected = load_model(hf_directory("gpt2")).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(tmp_path).state_dict().items())


def test_a_stored_copy_of_a_tied_head_must_be_one(copy):
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(copy).unembedding is None
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    with pytest.raises(InputError, match="differs from model.embed_tokens.weight"):
        load_model(copy)


def test_a_renamed_tensor_fails_by_name(copy):
    rewrite(copy, lambda t: t.update({"model.layers.1.mlp.oops.weight": t.pop("model.layers.1.mlp.up_proj.weight")}))
    with pytest.raises(InputError) as caught:
        load_model(copy)
    assert "missing: model.layers.1.mlp.up_proj.weight" in caught.value.message
    assert "unexpected: model.layers.1.mlp.oops.weight" in caught.value.message


def test_a_misshapen_tensor_fails_by_name(copy):
    rewrite(copy, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(InputError, match=r"model.norm.weight in .* has shape \[7\], expected \[48\]"):
        load_model(copy)


def test_more_layers_in_the_config_than_in_the_file(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(InputError, match="missing: .* and 14 more"):
        load_model(copy)


@pytest.mark.parametrize("keep", [4, 200, -100])
def test_a_truncated_file_is_damaged(copy, keep):
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:keep])
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        load_model(copy)


def test_pickles_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle") as caught:
        load_model(copy)
    assert "llmctl.nn.unpickle" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no model: it has no config.json"),
        ({"config.json": "{"}, "cannot be read"),
        ({"config.json": "[]"}, "is no JSON object"),
        ({"config.json": '{"architectures": ["MambaForCausalLM"]}'}, "`architectures`.*MambaForCausalLM"),
    ],
)
def test_what_is_no_model(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model.safetensors"):
        load_model(copy)


def test_a_full_disk_is_a_stage_error(copy, tmp_path):
    """A limit on the size of files fails in the middle of writing, as a full disk does."""
    model = load_model(copy)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(StageError, match="cannot write model.safetensors"):
            save_model(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_loaded_model_trains(copy):
    model = load_model(copy)
    model(torch.arange(5)[None]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
