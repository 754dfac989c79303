"""Models of the hub as inputs: which files come, what is checked, what every failure leaves behind."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest

from llmctl.errors import InputError, MachineError
from llmctl.spec.hub_address import BadAddress, HubAddress, parse_hub
from llmctl.store.external import read_external
from llmctl.store.hub import POOLING, fetch_model, read_hub
from llmctl.text.pooling import POOLING_FILES, normalises, read_pooling

NAME = "acme/tiny"
KEPT = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
ADDRESS = HubAddress(repo=NAME)


def names(directory):
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def fetch(store, text=f"hf://{NAME}", types=("model.hf",)):
    return read_hub(store, parse_hub(text), types)


def leftovers(home):
    """What lies in the views and among the blobs that is not whole."""
    views = [path for path in (home / "cache").rglob("*") if path.name.startswith(".") and path.name != ".hub.json"]
    return views + [path for path in (home / "hf").rglob("*") if path.is_symlink() and not path.exists()]


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo", "revision", "pickle"),
    [
        ("hf://acme/tiny", "acme/tiny", "", False),
        ("hf://gpt2", "gpt2", "", False),
        ("hf://acme/tiny-1.5@v1.0", "acme/tiny-1.5", "v1.0", False),
        ("hf://acme/tiny@refs/pr/3?allow_pickle", "acme/tiny", "refs/pr/3", True),
    ],
)
def test_an_address_is_read_and_written(text, repo, revision, pickle):
    found = parse_hub(text)
    assert found == HubAddress(repo=repo, revision=revision, allow_pickle=pickle)
    assert str(found) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://", "is no address of a model"),
        ("hf://a/b/c", "is no address of a model"),
        ("hf://a/../b", "is no address of a model"),
        ("hf://a/b@main/../x", "is no address of a model"),
        ("hf://a/b?trust", "the only option is `?allow_pickle`"),
        ("hf://datasets/a/b", "`hf://datasets/` is not supported yet"),
    ],
)
def test_what_is_no_address_is_refused(text, message):
    with pytest.raises(BadAddress, match="hf://") as error:
        parse_hub(text)
    assert message in str(error.value)


# -- what comes -------------------------------------------------------------------------------------------------------


def test_what_makes_the_model_comes_and_nothing_else(hub, store, model):
    commit = hub.add(NAME, model)
    found = fetch(store)
    assert names(found.external.artifact.path) == KEPT
    assert found.commit == commit and found.external.artifact.type == "model.hf"
    assert {name for name in hub.counts() if "." in name} == set(KEPT)


def test_its_identity_is_that_of_the_same_files_in_a_directory(hub, store, model, tmp_path):
    hub.add(NAME, model)
    local = tmp_path / "local"
    local.mkdir()
    for name in KEPT:
        data = model[name]
        (local / name).write_bytes(data.encode() if isinstance(data, str) else data)
    assert fetch(store).external.artifact.id == read_external(store, local, ("model.hf",)).artifact.id
    (local / "config.json").write_text("{}")
    assert fetch(store).external.artifact.id != read_external(store, local, ("model.hf",)).artifact.id


def test_shards_are_those_of_the_index(hub, store, shards):
    hub.add(NAME, {**shards, "model-00009-of-00009.safetensors": b"of another index"})
    found = fetch(store).external.artifact
    expected = [name for name in KEPT if name != "model.safetensors"]
    expected += ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names(found.path) == sorted(expected)
    assert found.metadata["parameters"] == 4100


def test_an_index_that_names_a_file_elsewhere_is_refused(hub, store, shards):
    index = {"weight_map": {"a": "../../../../etc/passwd"}}
    hub.add(NAME, {**shards, "model.safetensors.index.json": json.dumps(index)})
    with pytest.raises(InputError, match="lacks .*passwd, though"):
        fetch(store)


def test_a_sentence_encoder_brings_along_how_it_pools(hub, store, model, monkeypatch):
    assert POOLING == POOLING_FILES
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()]
    said = {
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}',
    }
    hub.add(NAME, {**model, **said, "2_Other/config.json": "{}"})
    first = fetch(store).external
    path = first.artifact.path
    assert names(path) == sorted([*KEPT, "1_Pooling", "modules.json"])
    assert read_pooling(path) == "cls" and not normalises(path)
    # Without the hub the same comes from the cache.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree(path)
    again = fetch(store).external
    assert names(again.artifact.path) == sorted([*KEPT, "1_Pooling", "modules.json"])
    assert again.artifact.id == first.artifact.id and read_pooling(path) == "cls"


def test_a_tokenizer_alone(hub, store, model):
    hub.add(NAME, {**model, "vocab.json": "{}"})
    found = fetch(store, types=("tokenizer",)).external.artifact
    assert names(found.path) == ["tokenizer.json", "vocab.json"] and found.type == "tokenizer"
    assert "model.safetensors" not in hub.counts()


def test_a_branch_is_followed_and_a_commit_is_not(hub, store, model):
    old = hub.add(NAME, model)
    new = hub.repositories[NAME].commit({**model, "config.json": '{"vocab_size": 17}'})
    hub.repositories[NAME].commit({**model, "config.json": '{"vocab_size": 18}'}, "next")
    assert fetch(store).commit == fetch(store, f"hf://{NAME}@main").commit == new
    assert fetch(store, f"hf://{NAME}@{old}").commit == old
    ids = {fetch(store, f"hf://{NAME}@{rev}").external.artifact.id for rev in (old, new, "main", "next")}
    assert len(ids) == 3


def test_what_is_here_does_not_come_again(hub, store, model):
    commit = hub.add(NAME, model)
    fetch(store)
    hub.requests.clear()
    fetch(store)
    assert [path.lower() for _, path, *_ in hub.requests] == [f"/api/models/{NAME}?blobs=true"]
    hub.requests.clear()
    fetch(store, f"hf://{NAME}@{commit}")
    assert hub.requests == []


def test_the_cache_alone_with_hf_hub_offline(hub, store, model, home, monkeypatch):
    import huggingface_hub

    hub.add(NAME, model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="is not in the cache .*, and HF_HUB_OFFLINE is set"):
        fetch(store)
    for name in (*KEPT, "README.md"):  # as another program has left it
        huggingface_hub.hf_hub_download(NAME, name, cache_dir=home / "hf/hub", endpoint=hub.endpoint, token=False)
    hub.requests.clear()
    found = fetch(store)
    assert names(found.external.artifact.path) == KEPT and hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert fetch(store).external.artifact.id == found.external.artifact.id


def test_what_a_branch_meant_is_known_offline(hub, store, model, home, monkeypatch):
    import shutil

    commit = hub.add(NAME, model)
    hub.repositories[NAME].branches["v1"] = commit
    for text in (f"hf://{NAME}", f"hf://{NAME}@v1"):
        fetch(store, text)
    shutil.rmtree(home / "cache")  # so that a view is made of what is in the hub's cache
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(store).commit == fetch(store, f"hf://{NAME}@v1").commit == commit
    with pytest.raises(InputError, match="acme/tiny@v2 is not in the cache"):
        fetch(store, f"hf://{NAME}@v2")


def test_the_cache_is_checked_offline_too(hub, store, model, home, monkeypatch):
    import shutil

    hub.add(NAME, model)
    blob = (fetch(store).external.artifact.path / "config.json").resolve()
    shutil.rmtree(home / "cache")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes().replace(b"16", b"17"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="config.json of hf://acme/tiny@.* is damaged") as error:
        fetch(store)
    assert blob.exists() and f"delete {blob}" in error.value.hint


def test_a_cache_that_was_emptied_is_filled_again(hub, store, model, home):
    import shutil

    hub.add(NAME, model)
    first = fetch(store).external.artifact.id
    shutil.rmtree(home / "hf")
    assert fetch(store).external.artifact.id == first


# -- the token --------------------------------------------------------------------------------------------------------


def test_the_token_comes_from_the_environment_only(hub, store, model, home, monkeypatch):
    hub.add(NAME, model, private="hf_canary123")
    (home / "hf").mkdir()
    (home / "hf/token").write_text("hf_canary123")  # as `hf auth login` leaves it
    with pytest.raises(InputError, match="there is no model acme/tiny at .*, or it is private") as error:
        fetch(store)
    assert "export HF_TOKEN" in error.value.hint
    assert {key for *_, key, _ in hub.requests} == {None}
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_canary124")
    with pytest.raises(InputError, match="or it is private") as error:
        fetch(store)
    assert "canary" not in f"{error.value} {error.value.hint} {error.value.__cause__}"
    assert "Bearer hf_canary124" in {key for *_, key, _ in hub.requests}
    monkeypatch.setenv("HF_TOKEN", "hf_canary123")
    assert fetch(store).external.artifact.type == "model.hf"
    assert {path.startswith("/cdn/") for _, path, key, _ in hub.requests if key is None} == {True}
    for path in (home / "store", home / "cache"):
        assert not any(b"canary" in file.read_bytes() for file in path.rglob("*") if file.is_file())


# -- failures ---------------------------------------------------------------------------------------------------------


def test_no_such_model(hub, store, home):
    with pytest.raises(InputError, match="there is no model acme/tiny at http://127") as error:
        fetch(store)
    assert "check the name" in error.value.hint and not leftovers(home)


def test_a_gated_model(hub, store, model, home):
    hub.add(NAME, model, gated=True)
    with pytest.raises(InputError, match="is gated") as error:
        fetch(store)
    assert f"ask for access at {hub.endpoint}/{NAME}" in error.value.hint and not leftovers(home)


def test_no_such_revision(hub, store, model, home):
    hub.add(NAME, model)
    with pytest.raises(InputError, match="acme/tiny has no revision `v9`") as error:
        fetch(store, f"hf://{NAME}@v9")
    assert "a branch, a tag or a commit" in error.value.hint and not leftovers(home)


def test_a_repository_without_a_model(hub, store):
    hub.add(NAME, {"README.md": "nothing"})
    with pytest.raises(InputError, match="holds no model.hf"):
        fetch(store)
    with pytest.raises(InputError, match="gives a model or a tokenizer, wanted dataset.chat"):
        fetch(store, types=("dataset.chat",))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_bytes_that_are_not_the_hubs_are_thrown_away(hub, store, model, home, file):
    hub.add(NAME, model)
    data = model[file] if isinstance(model[file], bytes) else model[file].encode()
    hub.wrong[file] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(InputError, match=f"{file} of hf://acme/tiny@.* is damaged") as error:
        fetch(store)
    assert error.value.hint == "it was thrown away; run the same command again"
    assert not leftovers(home) and not list((home / "cache").rglob("config.json"))
    hub.wrong.clear()
    assert names(fetch(store).external.artifact.path) == KEPT


def test_a_file_that_changed_in_the_cache_is_refused(hub, store, model):
    commit = hub.add(NAME, model)
    path = fetch(store).external.artifact.path / "model.safetensors"
    blob = path.resolve()
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    for text in (f"hf://{NAME}", f"hf://{NAME}@{commit}"):
        with pytest.raises(InputError, match="was changed after it came from the hub") as error:
            fetch(store, text)
        assert str(blob) in error.value.hint


def test_a_download_that_breaks_off_goes_on(hub, store, model, home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    hub.add(NAME, model)
    hub.cut["model.safetensors"] = 1
    with pytest.raises(InputError, match="the download of model.safetensors of .* broke off") as error:
        fetch(store)
    assert "it goes on where it was" in error.value.hint and not leftovers(home)
    (part,) = (home / "hf").rglob("*.incomplete")
    half = part.stat().st_size
    assert 0 < half < len(model["model.safetensors"])
    hub.requests.clear()
    assert names(fetch(store).external.artifact.path) == KEPT
    assert f"bytes={half}-" in [span for *_, span in hub.requests]


def test_no_connection(home, store, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot reach http://127.0.0.1:9: Connection refused") as error:
        fetch(store)
    assert "HF_HUB_OFFLINE=1" in error.value.hint and not leftovers(home)


@pytest.mark.parametrize(("status", "message"), [(503, "answers HTTP 503"), (403, "refuses hf://acme/tiny")])
def test_a_hub_that_stumbles(hub, store, model, status, message):
    hub.add(NAME, model)
    hub.status = status
    with pytest.raises(InputError, match=message):
        fetch(store)


def test_without_the_library_the_extra_is_named(home, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MachineError, match="needs the module `huggingface_hub`") as error:
        fetch(store)
    assert error.value.hint == "pip install 'llmctl[hub]'"


# -- pickles ----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def pickled(model):
    torch = pytest.importorskip("torch")
    import io

    def make(value=None):
        data = io.BytesIO()
        weight = torch.arange(6.0).reshape(2, 3)
        torch.save({"a": weight, "tied": weight, "b": weight[:1]} if value is None else value, data)
        return {name: data for name, data in model.items() if not name.endswith(".safetensors")} | {
            "pytorch_model.bin": data.getvalue()
        }

    return make


def test_a_pickle_is_never_fetched_unasked(hub, store, pickled):
    hub.add(NAME, pickled())
    with pytest.raises(InputError, match="has its weights as a pickle only") as error:
        fetch(store)
    assert "?allow_pickle'" in error.value.hint and "pytorch_model.bin" not in hub.counts()


def test_an_allowed_pickle_becomes_safetensors(hub, store, pickled):
    from safetensors.numpy import load_file

    hub.add(NAME, pickled() | {"1_Pooling/config.json": '{"pooling_mode": "cls"}'})
    found = fetch(store, f"hf://{NAME}?allow_pickle").external.artifact
    assert names(found.path) == ["1_Pooling", *KEPT] and read_pooling(found.path) == "cls"
    tensors = load_file(found.path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "tied": [[0, 1, 2], [3, 4, 5]],
        "b": [[0, 1, 2]],
    }
    assert fetch(store, f"hf://{NAME}?allow_pickle").external.artifact.id == found.id


def test_an_allowed_pickle_runs_no_code(hub, store, pickled, home):
    hub.add(NAME, pickled() | {"pytorch_model.bin": pickle.dumps(Evil())})
    with pytest.raises(InputError, match="cannot read the pickle of hf://acme/tiny"):
        fetch(store, f"hf://{NAME}?allow_pickle")
    assert not list(home.rglob("pwned")) and not leftovers(home)
    subprocess.run([sys.executable, "-c", "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"],
                   input=pickle.dumps(Evil()), cwd=home, check=True)  # fmt: skip
    assert (home / "pwned").exists()  # the control: it is evil


def test_allowing_a_pickle_changes_nothing_where_there_are_safetensors(hub, store, model):
    hub.add(NAME, model)
    assert names(fetch(store, f"hf://{NAME}?allow_pickle").external.artifact.path) == KEPT
    assert "pytorch_model.bin" not in hub.counts()


def test_fetch_model_says_what_it_means(hub, store, model):
    commit = hub.add(NAME, model)
    assert str(fetch_model(store, ADDRESS, ()).address) == f"hf://{NAME}@{commit}"
