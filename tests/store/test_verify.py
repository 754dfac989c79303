"""`llmctl verify`: everything that is wrong is listed, and what is right passes."""

import shutil

import pytest

from llmctl.store import names


@pytest.fixture
def artifact(put):
    return put({"a.txt": "one", "b/c.txt": "two", "d.txt": "three"})


def write(path, text):
    path.chmod(0o644)
    path.write_text(text)


def test_a_whole_store_passes(store, artifact, put, call):
    put({"x": "1"}, type="metrics")
    names.write(store, "p", "a", {"out": (artifact.id, "report")}, key="k", run="r")
    at = ("--store", store.root)
    for args in ((artifact.id,), ("p/a",), (artifact.path,), ("--all",), ("--all", "--deep")):
        done = call("verify", *args, *at)
        assert done.code == 0, done.error
        assert ("every file hashed" if "--deep" in args else "sizes fit") in done.out
    assert len(call("verify", "--all", "--format", "json", *at).json) == 2
    assert call("verify", "--all", "--store", store.root.parent / "none").out == "nothing to check\n"


def test_every_problem_is_listed(store, artifact, call):
    write(artifact / "a.txt", "ONE")
    write(artifact / "d.txt", "three and more")
    (artifact / "b/c.txt").unlink()
    (artifact / "b/new.txt").write_text("x")
    (artifact / "b/link").symlink_to("/etc/hostname")
    at = ("--store", store.root, "--format", "json")
    shallow = call("verify", artifact.id, *at)
    assert shallow.code == 5 and "1 of 1 artifacts failed" in shallow.error
    expected = [
        f"{artifact / 'b/c.txt'} is missing",
        f"{artifact / 'd.txt'} has 14 bytes instead of 5",
        f"{artifact / 'b/link'} does not belong to the artifact",
        f"{artifact / 'b/new.txt'} does not belong to the artifact",
    ]
    assert shallow.json[0]["problems"] == expected
    deep = call("verify", artifact.id, "--deep", *at)
    assert deep.json[0]["problems"][:4] == expected
    assert deep.json[0]["problems"][4].startswith(f"{artifact / 'a.txt'} is damaged: its sha256 is ")
    text = call("verify", artifact.id, "--store", store.root).out
    assert "4 problems" in text and all(problem in text for problem in expected)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: (d / "llmctl.json").unlink(), "llmctl.json is missing"),
        (lambda d: write(d / "llmctl.json", "{"), "llmctl.json is damaged: it is no valid manifest"),
        (
            lambda d: write(d / "llmctl.json", (d / "llmctl.json").read_text().replace('"size": 3', '"size": 4')),
            "its id is not that of its list of files",
        ),
        (
            lambda d: [(d / "a.txt").unlink(), (d / "a.txt").symlink_to(d / "d.txt")],
            "a.txt is a symbolic link",
        ),
    ],
)
def test_a_damaged_manifest_and_links(edit, message, store, artifact, call):
    edit(artifact.path)
    for which in (artifact.id, "--all"):
        done = call("verify", which, "--store", store.root, "--format", "json")
        assert done.code == 5
        assert message in " ".join(done.json[0]["problems"])


def test_an_artifact_under_the_name_of_another(store, artifact, put, call):
    other = put({"x": "1"})
    shutil.rmtree(other.path)
    shutil.copytree(artifact.path, other.path)
    done = call("verify", other.id, "--store", store.root)
    assert "is of another artifact" in done.out


def test_copies_elsewhere(store, artifact, call, tmp_path):
    call("get", artifact.id, tmp_path / "out", "--store", store.root)
    at = ("--store", store.root)
    assert call("verify", tmp_path / "out", "--deep", *at).code == 0
    (tmp_path / "out/a.txt").write_text("ONE")
    assert call("verify", tmp_path / "out", *at).code == 0  # the control: same size
    done = call("verify", tmp_path / "out", "--deep", *at)
    assert done.code == 5 and "a.txt is damaged" in done.out
    (tmp_path / "plain").mkdir()
    assert "was not made by llmctl: it has no llmctl.json" in call("verify", tmp_path / "plain", *at).out


def test_one_that_is_missing_does_not_hide_the_others(store, artifact, call):
    write(artifact / "d.txt", "3")
    done = call("verify", "p/none", "./none", "sha256:" + "0" * 64, artifact.id, "--store", store.root)
    assert done.code == 5 and "4 of 4 artifacts failed" in done.error
    for text in (
        "there is no result named `p/none`",
        "no such file",
        "there is no artifact sha256:00000000",
        "d.txt has",
    ):
        assert text in done.out


def test_a_name_that_leads_nowhere(store, artifact, call):
    names.write(store, "p", "a", {"out": (artifact.id, "report")}, key="k", run="r")
    shutil.rmtree(artifact.path)
    done = call("verify", "--all", "--store", store.root)
    assert done.code == 5 and f"p/a.out is the name of {artifact.id[:15]}, which is gone" in done.out


def test_usage(store, call):
    assert call("verify", "--store", store.root).code == 2
    assert call("verify", "--all", "p/a", "--store", store.root).code == 2
