"""Finding the store, names, what a person types, copies, tables."""

import errno
import json
import os
import socket

import pytest

from llmctl.errors import InputError
from llmctl.store import Store, names
from llmctl.store.copying import materialise
from llmctl.store.locks import holder, try_lock


def test_where_the_store_is(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMCTL_STORE", raising=False)
    (tmp_path / "project/deep/down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project/deep/down")
    assert Store.open().root == tmp_path / "project/deep/down/.llmctl/store"
    (tmp_path / "project/.llmctl").mkdir()
    assert Store.open().root == tmp_path / "project/.llmctl/store"
    monkeypatch.setenv("LLMCTL_STORE", str(tmp_path / "shared"))
    assert Store.open().root == tmp_path / "shared"
    assert Store.open(tmp_path / "given").root == tmp_path / "given"
    assert not (tmp_path / "shared").exists()


def test_a_new_store_is_ignored_by_git(tmp_path):
    Store(tmp_path / ".llmctl/store").create()
    assert (tmp_path / ".llmctl/.gitignore").read_text() == "*\n"
    assert json.loads((tmp_path / ".llmctl/store/store.json").read_text()) == {"format": 1}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: (p / "thesis.txt").write_text("x"), "is no llmctl store"),
        (lambda p: (p / "store.json").write_text('{"format": 2}'), "format 2, this llmctl knows 1"),
        (lambda p: (p / "store.json").write_text("{}"), "store.json is damaged"),
    ],
)
def test_a_directory_that_is_no_store(prepare, message, tmp_path):
    prepare(tmp_path)
    with pytest.raises(InputError, match=message):
        Store.open(tmp_path)


def test_a_store_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        Store.open(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write the store"):
        Store(tmp_path / "file/store").create()


def test_a_read_only_store_is_no_bug(store, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=f"cannot write the store {store.root}: it is read-only"):
        store.create()


def test_a_read_only_file_system_is_no_bug(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(InputError, match="cannot write the store .*: Read-only file system"):
        Store(tmp_path / "new").create()


def test_sweep_takes_only_what_the_dead_left(store):
    host = socket.gethostname()
    mine = store.staging()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    dead = store.root / "tmp" / f"{host}-{pid}-{'0' * 32}"
    elsewhere = store.root / "tmp" / f"not-{host}-{pid}-{'0' * 32}"
    dead.mkdir()
    dead.with_name(f"{host}-{pid}-{'1' * 32}").write_text("half a file")
    elsewhere.mkdir()
    store.sweep()
    assert sorted(path.name for path in (store.root / "tmp").iterdir()) == sorted([mine.name, elsewhere.name])


@pytest.fixture
def named(put, store):
    """p/a has outputs text and metrics, p/b only metrics, p/c two results."""
    made = {
        n: put({"x": n}, type=t) for n, t in (("text", "dataset.text"), ("numbers", "metrics"), ("other", "tokenizer"))
    }

    def refs(stage, **ports):
        outputs = {port: (made[name].id, made[name].type) for port, name in ports.items()}
        names.write(store, "p", stage, outputs, key="sha256:1", run="r")

    refs("a", text="text", metrics="numbers")
    refs("b", metrics="numbers")
    refs("c", text="text", tokenizer="other", metrics="numbers")
    refs("a.b", text="other")
    return made


def test_what_a_person_types(named, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = named["text"]
    for typed in ("p/a", "p/a.text", "p/c.text", text.id, text.id[:15], text.id[7:15], str(text.path)):
        assert store.resolve(typed).id == text.id, typed
    assert store.resolve("p/b").id == store.resolve("p/a.metrics").id == named["numbers"].id
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a").write_text("a path comes first")
    assert store.resolve("p/a").type == "files"


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("p/c", "has several outputs", "p/c.text, p/c.tokenizer"),
        ("p/zzz", "there is no result named `p/zzz`", "known: p/a, p/a.b, p/b, p/c"),
        ("p/a.model", "there is no result named", "known"),
        ("p/a@best", "there is no result named", "known"),
        ("sha256:00000000", "there is no artifact `sha256:00000000`", "llmctl ls"),
        ("sha256:" + "0" * 64, "there is no artifact", "llmctl ls"),
        ("./nothing", "no such file, directory or artifact: ./nothing", "path"),
        ("model", "no such file, directory or artifact: model", "PIPELINE/STAGE"),
    ],
)
def test_what_is_not_there(typed, message, hint, named, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        store.resolve(typed)
    assert hint in error.value.hint


def test_a_prefix_must_be_long_enough_and_unique(store, put):
    id = put({"x": "1"}).id
    assert store.find(id[7:11]) == store.find(id[:11]) == id
    with pytest.raises(InputError, match="is no content id"):
        store.find(id[7:10])
    (store.artifact(id).parent / f"{id[7:15]}{'0' * 56}").mkdir()
    with pytest.raises(InputError, match="2 artifacts begin with"):
        store.find(id[7:15])


def test_a_wanted_type_is_checked(store, put):
    with pytest.raises(InputError, match="is a report, wanted model.onnx"):
        store.resolve(put({"x": "1"}).id, ("model.onnx",))


def test_names_follow_the_latest_and_tags_stay(store, put):
    one, two = put({"x": "1"}), put({"x": "2"})
    names.write(store, "p", "a", {"out": (one.id, "report")}, key="k1", run="r1", tag="best")
    names.write(store, "p", "a", {"out": (two.id, "report")}, key="k2", run="r2")
    assert store.resolve("p/a").id == two.id
    assert store.resolve("p/a@best").id == store.resolve("p/a.out@best").id == one.id


def test_a_copy_is_plain_and_writable(put, tmp_path):
    artifact = put({"a.txt": "1", "d/b.txt": "2"})
    materialise(artifact, tmp_path / "out")
    files = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert files == ["a.txt", "d/b.txt", "llmctl.json"]
    (tmp_path / "out/a.txt").write_text("changed")
    assert (artifact / "a.txt").read_text() == "1"


def test_a_copy_clears_what_a_killed_one_left(put, tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    for number, ending in enumerate(("", "-old")):
        left = tmp_path / f".out-{socket.gethostname()}-{pid}-{str(number) * 32}{ending}"
        (left / "sub").mkdir(parents=True)
    others = tmp_path / f".other-{socket.gethostname()}-{pid}-{'0' * 32}"
    others.mkdir()
    materialise(put({"x": "1"}), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"store", "out", others.name}


def test_a_copy_replaces_an_artifact_or_nothing(put, tmp_path):
    one, two, target = put({"a": "1"}), put({"b": "2"}), tmp_path / "out"
    target.mkdir()
    materialise(one, target)
    materialise(two, target)
    assert sorted(path.name for path in target.iterdir()) == ["b", "llmctl.json"]
    (target / "llmctl.json").unlink()
    with pytest.raises(InputError, match="exists and is no llmctl artifact"):
        materialise(one, target)
    materialise(one, target, force=True)
    assert sorted(path.name for path in target.iterdir()) == ["a", "llmctl.json"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_a_copy_that_cannot_be_written(put, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a writable directory"):
        materialise(put({"a": "1"}), tmp_path / "file/out")


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "locks/x.lock"
    with try_lock(path, "run") as lock:
        assert lock
        assert try_lock(path) is None
        assert f"pid {os.getpid()} on {socket.gethostname()}" in holder(path)
    with try_lock(path) as again:
        assert again
    assert holder(tmp_path / "none") == "another process"


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(llmctl, store, named):
    return lambda *args: llmctl(*args, "--store", store.root)


def test_ls(cli, named, llmctl, tmp_path):
    rows = json.loads(cli("ls", "--format", "json").stdout)
    assert {row["type"] for row in rows} == {"dataset.text", "metrics", "tokenizer"}
    (row,) = json.loads(cli("ls", "--type", "tokenizer", "--format", "json").stdout)
    assert row["names"] == ["p/a.b.text", "p/c.tokenizer"]
    text = cli("ls").stdout
    assert text.splitlines()[0].split() == ["ID", "TYPE", "SIZE", "MADE", "LATEST", "RESULT", "OF"]
    assert named["text"].id[:15] in text
    empty = llmctl("ls", "--store", tmp_path / "new")
    assert (empty.returncode, empty.stdout) == (0, f"no artifacts in {tmp_path / 'new'}\n")
    assert not (tmp_path / "new").exists()


def test_show(cli, named):
    value = json.loads(cli("show", "p/a", "--format", "json").stdout)
    assert value["id"] == named["text"].id
    assert value["files"] == [{"path": "x", "size": 4}]
    text = cli("show", "p/a", "--verify").stdout
    assert "dataset.text" in text
    assert "every file verified" in text
    path = named["text"].path / "x"
    path.chmod(0o644)
    path.write_text("TEXT")
    done = cli("show", "p/a", "--verify")
    assert done.returncode == 5
    assert f"error: {path} is damaged" in done.stderr


def test_lineage(cli, put):
    one = put({"x": "1"}, stage="make", instance="a", inputs={})
    two = put({"x": "2"}, stage="upper", instance="b", inputs={"text": [one.id], "more": ["sha256:" + "9" * 64]})
    top = put({"x": "3"}, stage="join", instance="c", inputs={"left": [one.id], "right": [two.id]})
    nodes = json.loads(cli("lineage", top.id, "--format", "json").stdout)
    assert [node["instance"] for node in nodes] == ["c", "a", "b", ""]
    assert cli("lineage", top.id[:15]).stdout.splitlines() == [
        f"{top.id[:15]}  c  report",
        f"├─ left: {one.id[:15]}  a  report",
        f"└─ right: {two.id[:15]}  b  report",
        f"   ├─ text: {one.id[:15]}  a  report",
        "   └─ more: sha256:99999999  from outside the store",
    ]


def test_get(cli, tmp_path):
    done = cli("get", "p/a", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/x").read_text() == "text"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis").write_text("x")
    refused = cli("get", "p/a", tmp_path / "mine")
    assert refused.returncode == 5
    assert "is no llmctl artifact" in refused.stderr
    assert cli("get", "p/a", tmp_path / "mine", "--force").returncode == 0
