"""Files from outside: their identity, the cache of digests, edits of copies, changes during a run."""

import json
import os
import shutil
import time

import pytest

from llmctl.errors import InputError
from llmctl.store import external
from llmctl.store.copying import materialise
from llmctl.store.external import DigestCache, Snapshot, expand, list_files, read_external

OLD = time.time_ns() - 60_000_000_000


@pytest.fixture
def corpus(tmp_path):
    """Two files that have been at rest for a minute."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "sub/b.txt").write_text("two")
    return folder


@pytest.fixture
def hashed(monkeypatch):
    """The names of all files that are hashed."""
    names = []
    real = external.hash_files

    def spy(paths):
        names.extend(path.name for path in paths)
        return real(paths)

    monkeypatch.setattr(external, "hash_files", spy)
    return names


def rest(*paths):
    """Pretend that the files were written a minute ago; the change time cannot be set, so it is looked away from."""
    for path in paths:
        os.utime(path, ns=(OLD, OLD))


def test_identity_is_names_and_bytes_not_place_or_time(store, corpus, tmp_path):
    first = read_external(store, corpus, ("files",)).artifact
    assert first.type == "files"
    moved = tmp_path / "elsewhere/other-name"
    shutil.copytree(corpus, moved)
    rest(moved / "a.txt")
    assert read_external(store, moved, ("files",)).artifact.id == first.id
    (moved / "a.txt").write_text("ONE")
    assert read_external(store, moved, ("files",)).artifact.id != first.id
    shutil.copy(corpus / "a.txt", moved / "a.txt")
    assert read_external(store, moved, ("files",)).artifact.id == first.id
    (moved / "a.txt").rename(moved / "c.txt")
    assert read_external(store, moved, ("files",)).artifact.id != first.id


def test_a_file_counts_by_its_name(store, corpus):
    one = read_external(store, corpus / "a.txt", ("files",)).artifact
    (corpus / "a.md").write_text("one")
    assert read_external(store, corpus / "a.md", ("files",)).artifact.id != one.id
    assert read_external(store, corpus / "a.md", ("files",), "a.txt").artifact.id == one.id


def test_a_file_at_rest_is_hashed_once(store, corpus, hashed, monkeypatch):
    cache, path = DigestCache(store), corpus / "a.txt"
    expected = external.hash_files([path])
    hashed.clear()
    # Hashed right after it was written: the next write could leave the same time stamps, so it is hashed again.
    assert cache.digests([path]) == cache.digests([path]) == expected
    assert hashed == ["a.txt", "a.txt"]
    later = time.time_ns() + 5_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert cache.digests([path]) == cache.digests([path]) == DigestCache(store).digests([path]) == expected
    assert hashed == ["a.txt"] * 3


def test_every_change_of_a_file_is_seen(store, corpus, hashed, monkeypatch):
    later = time.time_ns() + 5_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    cache, path = DigestCache(store), corpus / "a.txt"
    status = path.stat()
    first = cache.digests([path])
    # Same size, same mtime: the change time gives it away.
    path.write_text("eno")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert cache.digests([path]) != first
    # Replaced by another file with the same times: the inode gives it away.
    other = corpus / "other"
    other.write_text("neo")
    other.replace(path)
    second = cache.digests([path])
    assert second != first
    assert len(hashed) == 3


def test_a_cache_that_cannot_be_used_is_no_error(store, corpus):
    store.digests.write_bytes(b"this is no database at all, but long enough to look at")
    assert DigestCache(store).digests([corpus / "a.txt"]) == external.hash_files([corpus / "a.txt"])


def test_globs_and_hidden_files(corpus):
    (corpus / ".git").mkdir()
    (corpus / ".git/x.txt").write_text("x")
    (corpus / ".hidden.txt").write_text("x")
    assert [path.name for path in expand(corpus / "*.txt")] == ["a.txt"]
    assert [path.name for path in expand(corpus / "**/*.txt")] == ["a.txt", "b.txt"]
    assert [path.name for path in expand(corpus / ".hid*")] == [".hidden.txt"]
    assert expand(corpus / "*.md") == []
    assert expand(corpus / "missing") == []
    assert expand(corpus.parent / "nowhere/*.txt") == []
    assert list(list_files(corpus)) == ["a.txt", "sub/b.txt"]
    (corpus / "[1].txt").write_text("x")
    assert [path.name for path in expand(corpus / "[1].txt")] == ["[1].txt"]


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (lambda d: (d / "a.txt").write_text("longer"), "a.txt"),
        (lambda d: (d / "a.txt").unlink(), "a.txt"),
        (lambda d: (d / "new.txt").write_text("x"), "new.txt"),
        (lambda d: shutil.rmtree(d), ""),
    ],
)
def test_changes_during_a_run_are_seen(change, file, store, corpus):
    found = read_external(store, corpus, ("files",)).snapshot
    again = Snapshot.from_json(json.loads(json.dumps(found.to_json())))
    assert again.changed() == ""
    change(corpus)
    assert again.changed() == str(corpus / file)


@pytest.fixture
def copy(put, store, tmp_path, rows):
    artifact = put({"train.jsonl": rows({"text": "x"}), "notes.txt": "n"}, type="dataset.text", metadata={"rows": 1})
    materialise(artifact, tmp_path / "copy")
    return artifact, tmp_path / "copy"


def test_a_copy_is_the_artifact(copy, store):
    artifact, path = copy
    found = read_external(store, path, ("dataset.text", "files")).artifact
    assert (found.id, found.type, found.metadata) == (artifact.id, "dataset.text", {"rows": 1})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: (d / "notes.txt").write_text("m"), "notes.txt is damaged"),
        (lambda d: (d / "notes.txt").unlink(), "notes.txt is missing"),
        (lambda d: (d / "more.txt").write_text("m"), "more.txt does not belong to the artifact"),
        (lambda d: (d / "llmctl.json").write_text("{"), "llmctl.json is damaged"),
    ],
)
def test_an_edited_copy_does_not_pass_for_it(edit, message, copy, store):
    artifact, path = copy
    edit(path)
    with pytest.raises(InputError, match=message) as error:
        read_external(store, path, ())
    assert "delete" in error.value.hint
    (path / "llmctl.json").unlink()
    assert read_external(store, path, ("dataset.text",)).artifact.type == "dataset.text"


def test_the_same_files_without_a_manifest_have_the_same_id(copy, store):
    artifact, path = copy
    (path / "llmctl.json").unlink()
    assert read_external(store, path, ("dataset.text",)).artifact.id == artifact.id
    assert read_external(store, path, ("files",)).artifact.id != artifact.id


@pytest.mark.parametrize(
    ("accepted", "message"),
    [
        (("model.hf",), "is a dataset.text, wanted model.hf"),
        (("model.hf", "model.onnx"), "is a dataset.text, wanted model.hf or model.onnx"),
    ],
)
def test_another_type(accepted, message, copy, store):
    with pytest.raises(InputError, match=message):
        read_external(store, copy[1], accepted)
    (copy[1] / "llmctl.json").unlink()
    with pytest.raises(InputError, match="is no model.hf|is none of") as error:
        read_external(store, copy[1], accepted)
    assert "dataset.text" in f"{error.value.message} {error.value.hint}"


def test_a_model_brings_its_tokenizer_along(put, store, tmp_path):
    """A copy of a model is taken where a tokenizer is wanted, as any model directory without a manifest is."""
    files = {"config.json": "{}", "tokenizer.json": '{"model": {}}'}
    materialise(put(files, type="model.hf"), tmp_path / "copy")
    found = read_external(store, tmp_path / "copy", ("tokenizer",)).artifact
    assert found.type == "tokenizer" and found.metadata["tokenizer"].startswith("sha256:")
    (tmp_path / "copy/llmctl.json").unlink()
    assert read_external(store, tmp_path / "copy", ("tokenizer",)).artifact.id == found.id
    materialise(put({"config.json": "{}"}, type="model.hf"), tmp_path / "mute")
    with pytest.raises(InputError, match="is no tokenizer: tokenizer.json is missing"):
        read_external(store, tmp_path / "mute", ("tokenizer",))


def test_nothing_there(store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        read_external(store, tmp_path / "empty", ("files",))
