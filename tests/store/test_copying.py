"""Copies out of the store: what they may replace, and what is never lost with them."""

import errno
import os
import re
import socket
from pathlib import Path

import pytest

from llmctl.errors import InputError
from llmctl.pipeline.exports import export
from llmctl.store import Store
from llmctl.store.copying import materialise


@pytest.fixture
def artifact(put):
    return put({"a.txt": "one", "b/c.txt": "two"})


@pytest.fixture
def get(call, store, artifact):
    return lambda where, *args: call("get", artifact.id, where, "--store", store.root, *args)


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


# -- places whose loss would be a disaster ----------------------------------------------------------------------------


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
@pytest.mark.parametrize(
    ("where", "why"),
    [
        (".", "the current directory is in it"),
        ("..", "the current directory is in it"),
        ("/", "the current directory is in it"),
        ("../home", "your home directory is in it"),
        ("../other/.llmctl", "the store .* is in it"),
        ("../other", "the store .* is in it"),
        ("../store", "holds the artifact|the store .* is in it"),
        ("../store/new", "lies in the store"),
        ("../linked/new", "lies in the store"),
        ("../other/.llmctl/store/artifacts/x", "lies in the store"),
        ("ARTIFACT", "holds the artifact|lies in the store"),
    ],
)
def test_places_that_are_never_replaced(where, why, force, get, tmp_path, store, artifact):
    Store(tmp_path / "other/.llmctl/store").create()
    (tmp_path / "linked").symlink_to(store.root)
    (tmp_path / "cwd/mine").write_text("x")
    before = files(tmp_path)
    done = get(artifact.path if where == "ARTIFACT" else where, *force)
    assert done.code == 5
    assert re.search(why, done.error), done.error
    assert files(tmp_path) - {"store/guard.lock"} == before - {"store/guard.lock"}


def test_a_place_beside_them_is_fine(get, tmp_path):
    assert get("new/copy").code == 0
    assert get(".llmctl/exports/copy").code == 0
    assert files(tmp_path / "cwd/new/copy") == {"a.txt", "b/c.txt", "llmctl.json"}


# -- what the user keeps there ----------------------------------------------------------------------------------------


def edit(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


CHANGES = {
    "NOTES.md": lambda d: edit(d / "NOTES.md"),
    ".hidden": lambda d: edit(d / ".hidden"),
    "sub/NOTES.md": lambda d: edit(d / "sub/NOTES.md"),
    "a.txt": lambda d: edit(d / "a.txt", "ONE"),
    "b/c.txt": lambda d: edit(d / "b/c.txt", "two and more"),
    "llmctl.json": lambda d: edit(d / "llmctl.json", (d / "llmctl.json").read_text().replace("a.txt", "z.txt")),
    "link": lambda d: (d / "link").symlink_to("/etc"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_replaced_by_force_only(name, get, put, store, call, tmp_path):
    where = tmp_path / "out"
    assert get(where).code == 0
    CHANGES[name](where)
    kept = {path: (where / path).read_bytes() for path in files(where)}
    done = get(where)
    assert done.code == 5 and f"{where} was changed since llmctl wrote it: {name} " in done.error
    assert "--force" in done.hint
    assert {path: (where / path).read_bytes() for path in files(where)} == kept
    assert get(where, "--force").code == 0
    assert files(where) == {"a.txt", "b/c.txt", "llmctl.json"} and (where / "a.txt").read_text() == "one"


def test_what_only_lost_files_is_restored(get, tmp_path):
    where = tmp_path / "out"
    get(where)
    (where / "a.txt").unlink()
    assert get(where).code == 0
    assert (where / "a.txt").read_text() == "one"


def test_an_export_says_what_was_changed_and_leaves_it(artifact, put, tmp_path):
    where, other = tmp_path / "out", put({"a.txt": "another"})
    assert export(artifact, where) is True
    edit(where / "NOTES.md")
    assert export(artifact, where) is False  # it is there with all its files: nothing is replaced
    with pytest.raises(InputError, match=r"was changed since llmctl wrote it: NOTES.md "):
        export(other, where)
    assert (where / "NOTES.md").read_text() == "mine"
    (where / "NOTES.md").unlink()
    assert export(other, where) is True


def test_a_copy_that_fails_at_the_last_step_puts_the_old_one_back(artifact, put, tmp_path, monkeypatch):
    where, rename = tmp_path / "out", Path.rename
    materialise(artifact, where)

    def fails(self, target):
        if Path(target) == where and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "no luck")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no luck"):
        materialise(put({"x": "1"}), where)
    assert files(where) == {"a.txt", "b/c.txt", "llmctl.json"}
    assert list(tmp_path.glob(".out*")) == []


def test_what_a_killed_copy_moved_aside_stays_until_another_one_is_in_place(artifact, put, tmp_path, monkeypatch):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    aside = tmp_path / f".out-{socket.gethostname()}-{pid}-{'0' * 32}-old"
    materialise(artifact, aside)
    monkeypatch.setattr("llmctl.store.copying._copy", lambda *args: (_ for _ in ()).throw(OSError("no luck")))
    with pytest.raises(OSError, match="no luck"):
        materialise(artifact, tmp_path / "out")
    assert aside.is_dir()
    monkeypatch.undo()
    materialise(artifact, tmp_path / "out")
    assert not aside.exists()


def test_what_is_no_artifact_is_not_replaced(artifact, tmp_path):
    edit(tmp_path / "out/x")
    with pytest.raises(InputError, match="is no llmctl artifact"):
        materialise(artifact, tmp_path / "out")
