"""Names, tags and matrix instances: what they mean, how they lie on disk, what a typo gets."""

import json
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.errors import InputError
from llmctl.store import names
from llmctl.store.names import Names

INSTANCES = (
    "sft[lr=3e-5,seed=2]",
    "sft[lr=3e-05,seed=2]",
    "sft[data=./a/b.jsonl]",
    "sft[data=../a@b]",
    "sft[name=über alles, x]",
    "sft[q=a[0].b]",
    "sft[p=100%25]",
    "sft[tilde=~/x]",
    "sft[long=" + "abc.def/" * 60 + "1]",
    "sft[long=" + "abc.def/" * 60 + "2]",
)


def refs(store, stage, tag="", **ports):
    outputs = {port: (artifact.id, artifact.type) for port, artifact in ports.items()}
    names.write(store, "p", stage, outputs, key="sha256:1", run="r", tag=tag)


def test_instances_of_a_matrix_are_names_everywhere(store, put, call, tmp_path):
    made = {id: put({"x": id}) for id in INSTANCES}
    for id, artifact in made.items():
        refs(store, id, model=artifact, tag="best")
    files = list((store.refs / "p").iterdir())
    assert len(files) == 2 * len(INSTANCES)
    assert max(len(file.name.encode()) for file in files) < 255
    for id, artifact in made.items():
        for text in (f"p/{id}", f"p/{id}.model", f"p/{id}@best", f"p/{id}.model@best"):
            assert store.resolve(text).id == artifact.id, text
    assert set(names.every(store)) == {f"p/{id}.model{tag}" for id in INSTANCES for tag in ("", "@best")}
    first = INSTANCES[0]
    assert json.loads(call("show", f"p/{first}", "--format", "json", "--store", store.root).out)["id"] == made[first].id
    assert call("get", f"p/{first}", tmp_path / "out", "--store", store.root).code == 0
    assert (tmp_path / "out/x").read_text() == first


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=300), st.sampled_from(["", "model"]))
def test_file_names_are_reversible_and_fit(value, port):
    stage = f"sft[v={value}]"
    name = names.file_name(stage)
    assert len(name.encode()) <= 200
    assert "/" not in name and "@" not in name and "\0" not in name and not name.startswith(".")
    found = names.place(f"{name}{'.' if port else ''}{port}@best.json")
    assert (found.port, found.tag) == (port, "best")
    assert found.stage in (stage, "")


def test_two_ids_never_share_a_file():
    ids = [*INSTANCES, "a%2Fb", "a/b", "a~b", "a%7Eb", "a" * 200, "a" * 201]
    assert len({names.file_name(id) for id in ids}) == len(ids)


@pytest.mark.budget
def test_a_plan_of_two_thousand_instances_reads_the_directory_once(store, put, monkeypatch, budget):
    artifact = put({"x": "1"})
    for number in range(2000):
        path = store.refs / "p" / f"{names.file_name(f'sft[seed={number}]')}.model.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": artifact.id, "type": "report", "key": "k"}))
    listed = []
    monkeypatch.setattr(os, "listdir", lambda path, list=os.listdir: listed.append(path) or list(path))
    index = Names(store)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for number in range(2000):
        assert index.candidates(f"p/sft[seed={number}]")["model"]["id"] == artifact.id
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < budget(0.5)
    assert len(listed) == 1
    assert index.candidates("p/nothing") == index.candidates("q/sft") == index.candidates("no name") == {}


@pytest.fixture
def tagged(store, put):
    one, two = put({"x": "1"}), put({"y": "2"}, type="metrics")
    refs(store, "sft", model=one, metrics=two)
    return one, two


def test_tag_and_refs(store, tagged, call):
    one, two = tagged
    at = ("--store", store.root)
    for artifact, name in (
        (one.id[:15], "p/sft@best"),
        ("p/sft.metrics", "p/sft.metrics@good"),
        (one.id, "team/chat@v1"),
    ):
        done = call("tag", artifact, name, *at)
        assert done.code == 0, done.error
        assert name in done.out
    assert store.resolve("p/sft@best").id == store.resolve("team/chat@v1").id == one.id
    assert store.resolve("p/sft@good").id == store.resolve("p/sft.metrics@good").id == two.id
    rows = {row["name"]: row for row in call("refs", "--format", "json", *at).json}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "p/sft.metrics": "latest", "p/sft.metrics@good": "tag", "p/sft.model": "latest", "p/sft@best": "tag",
        "team/chat@v1": "tag",
    }  # fmt: skip
    assert rows["team/chat@v1"]["id"] == one.id and rows["team/chat@v1"]["time"].endswith("Z")
    text = call("refs", *at).out
    assert "team/chat@v1" in text and one.id[:15] in text
    assert call("tag", "--delete", "p/sft@best", *at).out == "p/sft@best is no more\n"
    with pytest.raises(InputError, match="there is no result named `p/sft@best`"):
        store.resolve("p/sft@best")
    assert store.resolve("p/sft").id == one.id


def test_a_tag_moves_as_a_whole(store, put, call):
    """A tag set by hand, then by a run, then by hand again always means what was said last."""
    one, two = put({"x": "1"}), put({"x": "2"})
    at = ("--store", store.root)
    assert call("tag", one.id, "p/sft@best", *at).code == 0
    refs(store, "sft", model=two, tag="best")
    assert store.resolve("p/sft@best").id == two.id
    assert call("tag", one.id, "p/sft@best", *at).code == 0
    assert store.resolve("p/sft@best").id == one.id
    removed = call("tag", "--delete", "p/sft@best", *at).out
    assert removed.splitlines() == ["p/sft.model@best is no more", "p/sft@best is no more"]


def test_a_wanted_type_chooses_among_outputs(store, put):
    text, tokenizer = put({"x": "1"}, type="dataset.text"), put({"x": "2"}, type="tokenizer")
    refs(store, "tok", text=text, tokenizer=tokenizer, tag="v1")
    assert store.resolve("p/tok@v1", ("tokenizer",)).id == tokenizer.id
    with pytest.raises(InputError, match="has several outputs") as error:
        store.resolve("p/tok@v1")
    assert error.value.hint == "choose one: p/tok.text@v1, p/tok.tokenizer@v1"


@pytest.mark.parametrize(
    ("args", "code", "message", "hint"),
    [
        (("tag", "p/sft"), 2, "1 names were given", "llmctl tag ARTIFACT NAME@TAG"),
        (("tag", "--delete", "p/sft", "p/x@y"), 2, "2 names were given", "llmctl tag --delete NAME@TAG"),
        (("tag", "p/sft", "best"), 2, "`best` is no name with a tag", "quickstart/sft@best"),
        (("tag", "p/sft", "p/sft"), 2, "`p/sft` is no name with a tag", "@TAG"),
        (("tag", "p/sft", "../x@y"), 2, "is no name with a tag", "@TAG"),
        (("tag", "p/stf", "p/sft@best"), 5, "there is no result named `p/stf`", "did you mean `p/sft`"),
        (("tag", "--delete", "p/sft@bets"), 5, "there is no tag `p/sft@bets`", "did you mean `p/sft@best`"),
        (("show", "p/sft.modle"), 5, "there is no result named `p/sft.modle`", "did you mean `p/sft.model`"),
    ],
)
def test_typos(args, code, message, hint, store, tagged, call):
    call("tag", tagged[0].id, "p/sft@best", "--store", store.root)
    done = call(*args, "--store", store.root)
    assert done.code == code
    assert message in done.error
    assert hint in done.hint


def test_no_names_yet(store, call):
    assert call("refs", "--store", store.root).out == f"no names in {store.root}\n"


def test_a_half_written_name_never_exists(store, put, monkeypatch):
    """The process dies while it writes the new meaning: the old one holds."""
    one, two = put({"x": "1"}), put({"x": "2"})
    names.set_tag(store, "p/sft@best", {"id": one.id, "type": "report"})

    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    monkeypatch.setattr("pathlib.Path.replace", die)
    with pytest.raises(Killed):
        names.set_tag(store, "p/sft@best", {"id": two.id, "type": "report"})
    assert store.resolve("p/sft@best").id == one.id


def test_in_a_shared_store_tags_are_the_projects_own_as_well(store, put, call, tmp_path, monkeypatch):
    one, two = put({"x": "1"}), put({"x": "2"})
    at = ("--store", store.root)
    for project in ("a", "b"):
        (tmp_path / project / ".llmctl").mkdir(parents=True)

    def rooted():
        return {(path.name, names.read_json(path)["id"]) for path in store.roots.glob("*/p/*.json")}

    monkeypatch.chdir(tmp_path / "a")
    assert call("tag", one.id, "p/sft@best", *at).code == 0
    monkeypatch.chdir(tmp_path / "b")
    assert call("tag", two.id, "p/sft@best", *at).code == 0
    assert rooted() == {("sft@best.json", one.id), ("sft@best.json", two.id)}
    names.write(store, "p", "sft", {"model": (two.id, "report")}, key="k", run="r", tag="best")
    assert ("sft@best.json", two.id) not in rooted()
    call("tag", "--delete", "p/sft@best", *at)
    assert rooted() == {("sft@best.json", one.id), ("sft.model.json", two.id)}
