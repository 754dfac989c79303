"""Weights in several files, as transformers writes and reads them; pickles only where they are asked for."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmctl.errors import InputError
from llmctl.nn.hf import load_model, save_model
from llmctl.nn.shards import read_shards, write_shards
from llmctl.nn.unpickle import main, read_pickles

from .conftest import random_hf

TOKENS = torch.arange(20)[None]


@pytest.mark.parametrize("limit", [10_000, 30_000, 10**9])
@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
def test_shards_are_those_of_transformers(name, limit, tmp_path):
    theirs = random_hf(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=limit)
    ours = {path.name: path for path in (tmp_path / "ours").glob("model*")}
    assert set(ours) == {path.name for path in (tmp_path / "theirs").glob("model*")}
    for path in (tmp_path / "theirs").glob("model*"):
        if path.suffix == ".json":
            # The order of their parameters is their modules'; which shard a tensor is in may differ, nothing else.
            index, other = json.loads(path.read_text()), json.loads(ours[path.name].read_text())
            assert index["metadata"] == other["metadata"] and index["weight_map"].keys() == other["weight_map"].keys()
    largest = max(parameter.nbytes for parameter in theirs.parameters())
    assert all(path.stat().st_size < max(limit, largest) + 9_000 for path in ours.values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, theirs(TOKENS).logits)
        again = load_model(tmp_path / "ours")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in load_model(tmp_path / "theirs").state_dict().items())


def test_tensors_that_share_memory_are_all_written(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": whole, "tied": whole, "row": whole[1], "turned": whole.T}
    write_shards(tensors, tmp_path)
    found = read_shards(tmp_path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_equal_tensors_give_equal_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards({"x": torch.ones(4), "y": torch.zeros(9)}, tmp_path / name, 20)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 3
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_an_index_and_its_files_must_agree(tmp_path):
    write_shards({"x": torch.ones(4), "y": torch.zeros(9)}, tmp_path, 20)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for change, message in (
        ({"z": "model-00001-of-00002.safetensors"}, "and its files differ in z"),
        ({"x": "model-00001-of-00002.safetensors"}, "and its files differ in x"),
        ({"y": "model-00002-of-00002.safetensors"}, "and its files differ in y"),
    ):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **change}}))
        with pytest.raises(InputError, match=message):
            read_shards(tmp_path)
    path.write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(InputError, match="is missing, though the index names it"):
        read_shards(tmp_path)
    path.write_text("{}")
    with pytest.raises(InputError, match="has no `weight_map`"):
        read_shards(tmp_path)


# -- pickles ----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def pickled(tmp_path) -> Path:
    """A tied GPT-2 as transformers once wrote it: one pickle, the head a second name of the embedding."""
    theirs = random_hf("gpt2")
    theirs.config.architectures = ["GPT2LMHeadModel"]
    theirs.config.save_pretrained(tmp_path / "old")
    torch.save(theirs.state_dict(), tmp_path / "old/pytorch_model.bin")
    return tmp_path / "old"


def test_a_pickle_is_read_on_request_only(pickled):
    with pytest.raises(InputError, match="holds its weights as a pickle .pytorch_model.bin.") as error:
        load_model(pickled)
    assert "python -m llmctl.nn.unpickle" in error.value.hint
    with torch.no_grad():
        found = load_model(pickled, allow_pickle=True)(TOKENS)
        torch.testing.assert_close(found, random_hf("gpt2")(TOKENS).logits, rtol=0, atol=1e-5)


def test_a_pickle_in_several_files(pickled):
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    (pickled / "pytorch_model.bin").unlink()
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, members in parts.items():
        torch.save({name: state[name] for name in members}, pickled / file)
    places = {name: file for file, members in parts.items() for name in members}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert read_pickles(pickled).keys() == state.keys()
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {**places, "more": names[0]}}))
    with pytest.raises(InputError):
        read_pickles(pickled)


def test_a_pickle_never_runs_code(pickled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        load_model(pickled, allow_pickle=True)
    torch.save({"a": torch.ones(1), "b": "text"}, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="something else than named tensors"):
        read_pickles(pickled)
    assert not (tmp_path / "pwned").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "pwned").exists()  # the control: it is evil


def test_a_directory_is_converted(pickled, tmp_path):
    (pickled / "tokenizer.json").write_text("{}")
    command = [sys.executable, "-m", "llmctl.nn.unpickle", str(pickled), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_file(tmp_path / "new/model.safetensors").keys() == read_pickles(pickled).keys()
    assert load_model(tmp_path / "new").config.arch == "gpt2"


def test_what_cannot_be_converted_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk")
    assert main(str(tmp_path), str(tmp_path / "new")) == 5
    assert capsys.readouterr().err.startswith("error: pytorch_model.bin cannot be read as tensors alone")
    assert not (tmp_path / "new").exists()
