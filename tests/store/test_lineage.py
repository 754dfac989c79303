"""What an artifact was made from: as a tree, as JSON, as a graph that Graphviz reads."""

import json
import re
import shutil
import subprocess

import pytest

from llmctl.store import external
from llmctl.store.external import list_files, read_external

QUOTED = r'"(?:[^"\\\n]|\\["\\n])*"'
STATEMENT = re.compile(rf"(?P<node>{QUOTED})(?: -> (?P<to>{QUOTED}))? \[label={QUOTED}(?:, style=dashed)?\];")
"""What a line of the graph must be: quoted names, at most one arrow, a quoted label."""

ODD = 'a[q="x\\y",\nz={<|>}]'


@pytest.fixture
def chain(store, put, tmp_path):
    """files → a → b, where the files are known by their path and `b` was made twice."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/one.md").write_text("one")
    outside = read_external(store, tmp_path / "notes", ("files",)).artifact
    unknown = "sha256:" + "9" * 64
    first = put({"x": "1"}, stage="make", instance=ODD, run="r1", inputs={"files": [outside.id, unknown]})
    key = "sha256:" + "1" * 64
    second = put(
        {"x": "2"}, stage="upper", instance="b", run="r1", key="sha256:" + "2" * 64, inputs={"text": [first.id]}
    )
    put(
        {"x": "2"},
        stage="lower",
        instance="c",
        run="r2",
        key=key,
        ended="2026-01-01T00:00:00Z",
        inputs={"in": [first.id]},
    )
    return {"outside": outside, "unknown": unknown, "first": first, "second": second}


def test_the_tree_names_files_from_outside_and_later_producers(chain, store, call, tmp_path):
    lines = call("lineage", chain["second"].id, "--store", store.root).out.splitlines()
    assert lines[0] == f"{chain['second'].id[:15]}  b  report"
    assert lines[1] == "│  (made again by c, run r2)"
    assert lines[-2] == f"   ├─ files: {chain['outside'].id[:15]}  {tmp_path}/notes  files  from outside the store"
    assert lines[-1] == "   └─ files: sha256:99999999  from outside the store"


def test_json(chain, store, call, tmp_path):
    nodes = {
        node["id"]: node for node in call("lineage", chain["second"].id, "--store", store.root, "--format", "json").json
    }
    (producer,) = nodes[chain["second"].id]["producers"]
    assert (producer["instance"], producer["run"], producer["inputs"]) == ("c", "r2", {"in": [chain["first"].id]})
    outside = nodes[chain["outside"].id]
    assert (outside["path"], outside["type"], outside["present"]) == (str(tmp_path / "notes"), "files", False)


def write(path, text):
    path.chmod(0o644)
    path.write_text(text)


def test_parameters_are_those_of_the_stage(store, put, call):
    made = put({"x": "1"}, stage="make", **{"with": {"seed": 7, "steps": [{"name": "length"}]}})
    (node,) = call("lineage", made.id, "--store", store.root, "--format", "json").json
    assert node["parameters"] == {"seed": 7, "steps": [{"name": "length"}]}


def test_verify_names_every_file_that_is_no_longer_the_same(chain, store, call, tmp_path):
    asked = ("lineage", chain["second"].id, "--store", store.root, "--verify")
    assert call(*asked).code == 0
    notes, stored = tmp_path / "notes", store.artifact(chain["first"].id) / "x"
    write(notes / "one.md", "two")  # as long as before
    (notes / "new.md").write_text("?")
    write(stored, "9")
    done = call(*asked)
    assert done.code == 5
    assert done.error.startswith(f"{stored} is damaged") and done.error.endswith(", and 2 more")
    for line in (f"! {stored} is damaged: ", f"! {notes}/one.md has changed since", f"! {notes}/new.md is new since"):
        assert line in done.out
    nodes = {node["id"]: node["problems"] for node in call(*asked, "--format", "json").json}
    assert [len(problems) for problems in nodes.values()] == [0, 1, 2, 0]
    shutil.rmtree(notes)
    assert f"! {notes} is missing" in call(*asked).out


def test_verify_looks_at_inputs_of_too_many_files_to_note(store, put, call, tmp_path, monkeypatch):
    monkeypatch.setattr(external, "MOST_FILES", 1)
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("one.md", "two.md"):
        (notes / name).write_text("1")
    outside = read_external(store, notes, ("files",)).artifact
    made = put({"x": "1"}, stage="make", inputs={"files": [outside.id]})
    asked = ("lineage", made.id, "--store", store.root, "--verify")
    assert call(*asked).code == 0
    write(notes / "two.md", "2")
    done = call(*asked)
    assert (done.code, done.error) == (5, f"{notes} has changed since it was read")
    shutil.rmtree(notes)
    assert call(*asked).error == f"{notes} is missing"


def test_verify_knows_a_single_file_and_copies(store, put, call, tmp_path):
    (tmp_path / "notes.md").write_text("one")
    outside = read_external(store, tmp_path / "notes.md", ("files",), "data").artifact
    made = put({"x": "1"}, stage="make", inputs={"files": [outside.id]})
    copy = tmp_path / "copy"
    assert call("get", made.id, copy, "--store", store.root).code == 0
    asked = ("lineage", copy, "--store", store.root, "--verify")
    assert call(*asked).code == 0
    write(tmp_path / "notes.md", "two")
    assert f"! {tmp_path}/notes.md has changed since" in call(*asked).out
    write(copy / "x", "3")
    assert call(*asked).error.startswith(f"{copy}/x is damaged")


def test_dot_is_strict_graphviz(chain, store, call):
    text = call("lineage", chain["second"].id, "--store", store.root, "--format", "dot").out
    lines = text.rstrip("\n").splitlines()
    assert lines[:3] == ["digraph lineage {", "  rankdir=LR;", "  node [shape=box];"] and lines[-1] == "}"
    found = [STATEMENT.fullmatch(line.strip()) for line in lines[3:-1]]
    assert all(found), lines
    nodes = {json.loads(match["node"]) for match in found if not match["to"]}
    edges = {(json.loads(match["node"]), json.loads(match["to"])) for match in found if match["to"]}
    first, second = chain["first"].id, chain["second"].id
    assert nodes == {first, second, chain["outside"].id, chain["unknown"]}
    assert edges == {(first, second), (chain["outside"].id, first), (chain["unknown"], first)}
    assert '\\"x\\\\y\\",\\nz={<|>}' in text
    if program := shutil.which("dot"):
        done = subprocess.run([program, "-Tsvg"], input=text.encode(), capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line", ['"a" -> "b" [label="x"y"];', '"a [label="x"];', 'a -> b [label="x"];', '"a" [label="x\\"];']
)
def test_the_check_can_fail(line):
    assert not STATEMENT.fullmatch(line)


def test_where_files_lay_is_in_no_id(store, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.md").write_text("one")
    ids = [read_external(store, tmp_path / name, ("files",)).artifact.id for name in ("here", "there")]
    assert ids[0] == ids[1]
    note = json.loads(store.external(ids[0]).read_text())
    assert note["path"] == str(tmp_path / "there") and [row["path"] for row in note["files"]] == list(
        list_files(tmp_path / "here")
    )
