"""The commit protocol: identity, durability marks, races, crashes at any instant."""

import hashlib
import json
import os
import random
import signal
import stat
import time

import pytest

from llmctl.errors import InputError
from llmctl.store import Store, types
from llmctl.store.hashing import NotPlain, plain_files
from llmctl.store.manifest import Manifest
from llmctl.store.store import Pointer


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def pointer(key, outputs, **fields):
    return Pointer(key=key, preimage={"v": 1}, outputs=outputs, **fields)


KEY = "sha256:" + "ab" * 32


def test_the_id_is_the_digest_of_the_canonical_file_list(put):
    artifact = put({"b/two.txt": "two", "one.txt": "one"}, type="report")
    text = """{"files":[{"path":"b/two.txt","sha256":"TWO","size":3},{"path":"one.txt","sha256":"ONE","size":3}],
"schema":"llmctl.artifact/v1","type":"report","type_version":1}""".replace("\n", "")
    text = text.replace("ONE", sha256(b"one")).replace("TWO", sha256(b"two"))
    assert artifact.id == f"sha256:{sha256(text.encode())}"


def test_what_is_committed(put, store):
    artifact = put({"one.txt": "one", "d/two.txt": "two"}, metadata={"rows": 2}, key=KEY, instance="a")
    assert artifact.path == store.root / "artifacts/sha256" / artifact.id[7:9] / artifact.id[7:]
    assert (artifact / "one.txt").read_text() == "one"
    for path in artifact.path.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o444
            assert path.stat().st_nlink == 1
    manifest = json.loads((artifact / "llmctl.json").read_text())
    assert manifest["metadata"] == {"rows": 2}
    assert manifest["provenance"] == {"key": KEY, "instance": "a"}
    assert manifest["bytes"] == 6
    assert store.get(artifact.id) == artifact
    assert store.get(artifact.id[7:15]) == artifact
    store.verify(artifact.id)
    assert list((store.root / "tmp").iterdir()) == []


def test_metadata_and_provenance_are_not_part_of_the_id(put):
    assert put({"a": "1"}, metadata={"x": 1}, key=KEY).id == put({"a": "1"}, key="sha256:" + "cd" * 32).id


@pytest.mark.parametrize(
    ("files", "type"),
    [({"a": "2"}, "report"), ({"b": "1"}, "report"), ({"a": "1"}, "metrics"), ({"a": "1", "b": ""}, "report")],
)
def test_names_bytes_and_type_are(files, type, put):
    assert put(files, type=type).id != put({"a": "1"}, type="report").id


def test_the_same_bytes_again_are_one_artifact_with_a_record(put, store):
    first, other = put({"a": "1"}, key=KEY), "sha256:" + "cd" * 32
    again = put({"a": "1"}, key=other)
    assert again == first
    assert list(store.ids()) == [first.id]
    assert Manifest.read(first.path).provenance["key"] == KEY
    assert json.loads(store.record(first.id, other).read_text())["provenance"]["key"] == other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: (d / "x").symlink_to("/etc/hostname"), "`x` is a symbolic link"),
        (lambda d: (d / "x").symlink_to("/etc"), "`x` is a symbolic link"),
        (lambda d: os.link(d / "plain", d / "x"), "has several hard links"),
        (lambda d: os.mkfifo(d / "x"), "`x` is no regular file"),
    ],
)
def test_only_plain_files(make, message, tmp_path):
    (tmp_path / "plain").write_text("1")
    assert plain_files(tmp_path) == ["plain"]
    make(tmp_path)
    with pytest.raises(NotPlain, match=message):
        plain_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["weights.pt", "model.pkl", "pytorch_model.bin", "pytorch_model-00001-of-2.bin", "a.ckpt"]
)
def test_no_pickles(name, tmp_path):
    (tmp_path / name).write_text("x")
    with pytest.raises(types.Unfit, match="can run code"):
        types.check_commit("report", tmp_path, [name])


@pytest.mark.parametrize("text", ["{", "NaN", '{"a": Infinity}', ""])
def test_json_files_are_json(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(types.Unfit, match="a.json is no valid JSON"):
        types.check_commit("report", tmp_path, ["a.json"])


def damaged(artifact, how):
    data = artifact / "a"
    data.chmod(0o644)
    if how == "truncate":
        data.write_text("")
    elif how == "remove":
        data.unlink()
    else:
        (artifact / "llmctl.json").unlink()


@pytest.mark.parametrize("how", ["truncate", "remove", "manifest"])
def test_damage_is_a_miss_and_the_next_commit_repairs_it(how, put, store):
    artifact = put({"a": "1", "b": "2"})
    store.publish(pointer(KEY, {"out": artifact.id}))
    assert store.lookup(KEY).outputs == {"out": artifact.id}
    damaged(artifact, how)
    assert store.lookup(KEY) is None
    with pytest.raises(
        InputError, match="llmctl.json|there is no artifact" if how == "manifest" else str(artifact / "a")
    ):
        store.get(artifact.id)
    assert put({"a": "1", "b": "2"}) == artifact
    assert store.lookup(KEY) is not None
    assert (artifact / "a").read_text() == "1"


def test_changed_bytes_of_the_same_size_are_found_by_verify(put, store):
    artifact = put({"a": "1"})
    (artifact / "a").chmod(0o644)
    (artifact / "a").write_text("2")
    assert store.get(artifact.id)
    with pytest.raises(InputError, match=str(artifact / "a")):
        store.verify(artifact.id)


def test_the_first_published_result_wins_unless_it_is_gone(put, store):
    one, two = put({"a": "1"}), put({"a": "2"})
    assert store.publish(pointer(KEY, {"out": one.id})).outputs == {"out": one.id}
    assert store.publish(pointer(KEY, {"out": two.id})).outputs == {"out": one.id}
    assert store.publish(pointer(KEY, {"out": two.id}), replace=True).outputs == {"out": two.id}
    damaged(two, "remove")
    assert store.publish(pointer(KEY, {"out": one.id})).outputs == {"out": one.id}
    assert store.lookup(KEY).preimage == {"v": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', '{"key": "x", "preimage": {}, "outputs": null}'])
def test_a_damaged_pointer_is_a_miss(text, store):
    store.key(KEY).parent.mkdir(parents=True)
    store.key(KEY).write_text(text)
    assert store.lookup(KEY) is None


def in_child(work):
    """Run `work()` in a forked process, which never returns into the tests."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def commit_one(store, content, key=None):
    directory = store.staging() / "out"
    directory.mkdir()
    for name in ("config.json", "weights"):
        (directory / name).write_bytes(content)
    files = plain_files(directory)
    artifact = store.commit(directory, "report", files, metadata={}, provenance={"key": key or ""})
    directory.parent.rmdir()
    return artifact


def test_kill_at_thirty_random_instants_leaves_no_partial_artifact(store):
    seeds = random.Random(5)
    found = 0
    for turn in range(30):

        def forever(turn=turn):
            for number in range(10_000):
                commit_one(store, f"{turn}/{number}".encode() * 50_000)

        pid = in_child(forever)
        time.sleep(seeds.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for id in store.ids():
            store.verify(id)
        directories = list((store.root / "artifacts/sha256").glob("*/*"))
        assert len(directories) == len(list(store.ids()))
        found = len(directories)
    assert found > 10  # the kills came in the middle of work, not before it
    leftovers = list((store.root / "tmp").glob("*-*"))
    assert leftovers
    store.sweep()
    assert not [path for path in (store.root / "tmp").glob("*-*") if path.is_dir()]


@pytest.mark.parametrize("same", [True, False])
def test_eight_racing_writers_have_one_winner(same, store):
    start = time.monotonic() + 0.15

    def write(number):
        time.sleep(max(0.0, start - time.monotonic()))
        artifact = commit_one(store, b"same" * 1000 if same else os.urandom(4000), KEY)
        won = store.publish(pointer(KEY, {"out": artifact.id}))
        (store.root / f"seen-{number}").write_text(won.outputs["out"])

    for pid in [in_child(lambda n=n: write(n)) for n in range(8)]:
        assert os.waitpid(pid, 0)[1] == 0
    seen = {path.read_text() for path in store.root.glob("seen-*")}
    assert seen == {store.lookup(KEY).outputs["out"]}
    assert len(list(store.root.glob("seen-*"))) == 8
    assert len(list(store.ids())) == (1 if same else 8)
    for id in store.ids():
        Store.open(store.root).verify(id)


@pytest.mark.parametrize("hidden", ["key", "artifact"])
def test_a_miss_is_believed_only_after_a_listing(hidden, put, store, monkeypatch):
    """NFS clients remember for a while that a name was not there; listing its directory makes them look again."""
    artifact = put({"a": "1"})
    store.publish(pointer(KEY, {"out": artifact.id}))
    directory = store.key(KEY).parent if hidden == "key" else artifact.path
    listed = []
    real_read, real_list = type(directory).read_text, os.listdir

    def read_text(path, *args, **kwargs):
        if path.is_relative_to(directory) and not listed:
            raise FileNotFoundError(path)
        return real_read(path, *args, **kwargs)

    def listdir(path):
        listed.extend([path] if str(path) == str(directory) else [])
        return real_list(path)

    monkeypatch.setattr("pathlib.Path.read_text", read_text)
    assert store.lookup(KEY) is None  # the control: nothing has been listed, so the name stays hidden
    monkeypatch.setattr(os, "listdir", listdir)
    assert store.lookup(KEY).outputs == {"out": artifact.id}
