"""`llmctl why`: each kind of change is named, and where nothing differs it says what is the matter."""

import json
import platform
import shutil
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from llmctl.cli import root
from llmctl.errors import LlmctlError
from llmctl.registry import discover
from llmctl.store import Store

STAGES = """
a: {uses: make, inputs: {files: ./notes/*.md}}
b: {uses: upper, inputs: {text: a}, with: {mark: x}, env: {MODE: "1", QUIET: {value: "1", affects_output: false}}}
"""

ROWS = """
a: {uses: make}
u: {uses: upper, inputs: {text: a}, matrix: {mark: [x]}, with: {mark: "${{ matrix.mark }}"}}
s: {uses: score, inputs: {text: u}, foreach: u}
best: {select: {text: "u[*].text", metrics: "s[*]"}, by: {metric: score, mode: max}}
"""


@dataclass
class Done:
    code: int
    out: str
    error: str
    hint: str


@pytest.fixture
def notes(work):
    (work / "notes").mkdir()
    for name in ("one", "two"):
        (work / f"notes/{name}.md").write_text(name)
    return work / "notes"


@pytest.fixture
def why(run, notes, monkeypatch):
    """Call `llmctl why` in this process, after a run of STAGES."""
    assert run(STAGES).code == 0

    def call(*args, command="why"):
        found = discover()
        monkeypatch.setattr("llmctl.registry.get_registry", lambda: found)
        result = CliRunner().invoke(root, [command, *map(str, args)])
        error = result.exception
        if error is None or isinstance(error, SystemExit):
            return Done(result.exit_code, result.stdout, result.stderr, "")
        if not isinstance(error, LlmctlError):
            raise error
        return Done(error.exit_code, result.stdout, error.message, error.hint or "")

    call.plan = lambda *args: json.loads(call("p.yaml", "--format", "json", *args, command="plan").out)
    return call


def changed(done):
    assert done.code == 0, done.error
    return {change["what"]: (change["before"], change["after"]) for change in json.loads(done.out)["changes"]}


def test_nothing_differs(why):
    done = why("p.yaml", "b")
    assert done.code == 0
    assert "p/b: cached" in done.out and "nothing differs, it is cached: run " in done.out


def test_a_parameter(why):
    done = why("p.yaml", "b", "--set", "b.mark=y")
    assert "p/b: would run" in done.out and "  with.mark x → y\n" in done.out
    assert changed(why("p.yaml", "a", "--set", "a.rows=4", "--format", "json")) == {"with.rows": ("default", 4)}
    assert changed(why("p.yaml", "a", "--set", "a.threads=4", "--format", "json")) == {}  # affects nothing


def test_the_environment(why, run, work):
    text = (work / "p.yaml").read_text()
    (work / "p.yaml").write_text(
        text.replace('MODE: "1"', 'MODE: "2"').replace('QUIET: {value: "1"', 'QUIET: {value: "2"')
    )
    assert changed(why("p.yaml", "b", "--format", "json")) == {"env.MODE": ("1", "2")}


def test_an_input_by_port_stage_and_file(why, run, notes):
    (notes / "two.md").write_text("zwei")
    done = why("p.yaml", "a")
    assert "inputs.files (./notes/*.md) two.md " in done.out
    assert "changed two.md" in done.out and "one.md" not in done.out
    done = why("p.yaml", "b")
    assert "p/b: depends on what runs before it" in done.out
    assert "`a` runs first: input files changed" in done.out
    run(None, to=["a"])
    done = why("p.yaml", "b")
    assert "inputs.text (a.text) a " in done.out and " → a " in done.out
    assert "train-00000-of-00001.jsonl.gz" in done.out and "dataset_info.json" not in done.out


def test_files_that_came_and_went(why, notes):
    (notes / "two.md").rename(notes / "three.md")
    done = why("p.yaml", "a")
    assert "new three.md" in done.out and "gone two.md" in done.out


def test_a_dependency_and_the_revision_of_the_plugin(why, fake_stages, run, monkeypatch):
    path = fake_stages / "fake_stages.py"
    text = path.read_text()
    path.write_text(
        text.replace(
            'headline=("rows",),\n)\nSCORE', 'headline=("rows",),\n    rev=2,\n    key_deps=("click",),\n)\nSCORE'
        )
    )
    for name in [name for name in __import__("sys").modules if name.startswith("fake_")]:
        monkeypatch.delitem(__import__("sys").modules, name)
    found = changed(why("p.yaml", "b", "--format", "json"))
    assert found["plugin.rev"] == (1, 2)
    assert found["key_deps.click"][0] == "none"


def test_an_artifact_that_is_gone(why, work):
    store = Store.open(work / ".llmctl/store")
    artifact = store.resolve("p/b.text")
    shutil.rmtree(artifact.path)
    done = why("p.yaml", "b")
    assert f"nothing differs, but its result is gone or damaged: text {artifact.id[:15]}" in done.out


def test_a_key_that_was_collected_is_read_from_the_manifest(why, work):
    store = Store.open(work / ".llmctl/store")
    for path in (store.root / "keys").glob("*/*.json"):
        path.unlink()
    assert changed(why("p.yaml", "a", "--set", "a.rows=4", "--format", "json")) == {"with.rows": ("default", 4)}
    assert "nothing differs, but it was never finished" in why("p.yaml", "a").out


def test_a_stage_that_failed_and_one_that_never_ran(why, run):
    run("c: {uses: wrong}")
    done = why("p.yaml", "c")
    assert "it has no result in this store yet" in done.out
    assert "it failed: " in done.out and "what happened" in done.out
    run("c: {uses: wrong, with: {how: machine}}", to=["c"])
    assert "what happened" not in why("p.yaml", "c", "--set", "c.how=raise").out  # another run was the last


def test_what_runs_whatever_there_is(why, run, work):
    run("a: {uses: make, cache: off}\np: {uses: send, inputs: {text: a}, with: {path: x}}", to=["p"])
    assert "cache: off" in why("p.yaml", "a").out
    assert "it acts on the world" in why("p.yaml", "p").out


def test_drift_is_information(why, work, monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "9.9.9")
    done = why("p.yaml", "b")
    assert "p/b: cached" in done.out
    assert "observed, in no key: python 3." in done.out and " → 9.9.9" in done.out


def test_the_facts_of_the_machine(why, run):
    """After a strict run `plan` and `why` say the same of the same keys."""
    assert run(refresh=True, strict=True).code == 0
    for path in (Store.open().root / "keys").glob("*/*.json"):
        if "machine" not in json.loads(path.read_text())["preimage"]:
            path.unlink()
    (strict,) = [row for row in why.plan("--strict-env") if row["stage"] == "a"]
    assert strict["action"] == "cached" and "nothing differs" in why("p.yaml", "a", "--strict-env").out
    (row,) = [row for row in why.plan() if row["stage"] == "a"]
    found = changed(why("p.yaml", "a", "--format", "json"))
    assert found["machine.python"] == (platform.python_version(), "any")
    assert [f"{what.removeprefix('machine.')} {old} → {new}" for what, (old, new) in found.items()] == row["why"]
    assert why("p/a.text", "p/b.text", "--strict-env").code == 2


def test_the_store_that_the_spec_asks_for(why, run, work):
    text = (work / "p.yaml").read_text()
    (work / "p.yaml").write_text(text.replace("stages:", "store: ./elsewhere\nstages:"))
    assert "it has no result in this store yet" in why("p.yaml", "a").out
    assert "it is cached" in why("p.yaml", "a", "--store", ".llmctl/store").out


def test_rows_and_choices(why, run):
    """A matrix of one row may be called by its base; a choice has nothing to be compared with."""
    assert run(ROWS).code == 0
    assert "p/u[mark=x]: cached" in why("p.yaml", "u").out
    chosen = why("p.yaml", "best")
    assert chosen.code == 0, chosen.error
    assert chosen.out.startswith("p/best: picks a row\n  u[mark=x]: score 1 is the largest of 1")
    assert (
        "p/best: depends on what runs before it\n  `s[mark=x]` runs first: "
        in why("p.yaml", "best", "--set", "s.score=2").out
    )


def test_two_artifacts(why, run):
    store = Store.open()
    first = store.resolve("p/b.text").id
    run(None, "b.mark=y", "a.rows=1")
    second = store.resolve("p/b.text").id
    done = why(first, "p/b.text")
    assert "with.mark x → y" in done.out and "inputs.text a " in done.out
    assert why(first, first).out.splitlines()[1] == "  they are one artifact"
    found = json.loads(why(first, second, "--format", "json").out)
    assert found["state"] == "compared" and [change["what"] for change in found["changes"]] == [
        "with.mark",
        "inputs.text",
    ]


def test_mistakes(why, notes):
    unknown = why("p.yaml", "bb")
    assert unknown.code == 2 and "there is no stage `bb`" in unknown.error
    outside = why(notes, "p/b.text")
    assert outside.code == 5 and "was not made by a stage" in outside.error
    both = why("p/a.text", "p/b.text", "--set", "a.rows=1")
    assert both.code == 2
    assert why("p/nothing", "p/b.text").code == 5
