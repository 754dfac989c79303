"""Inputs that no stage makes: files, globs, sources, ids, copies; missing, damaged and changing ones."""

import threading
import time

import pytest

from llmctl.store import Store


@pytest.fixture
def notes(work):
    """Two text files in `notes/`."""
    (work / "notes").mkdir()
    (work / "notes/a.txt").write_text("one")
    (work / "notes/b.txt").write_text("two")
    return work / "notes"


READ = "a: {uses: make, inputs: {files: './notes/*.txt'}, with: {rows: 0}}"


def test_what_counts_about_files(run, notes, actions):
    assert run(READ).stages["a"].metrics == {"rows": 2}
    (notes / "a.txt").touch()
    (notes / ".hidden.txt").write_text("x")
    assert run().stages["a"].status == "cached"
    (notes / "a.txt").write_text("ONE")
    assert run().stages["a"].status == "done"
    (notes / "a.txt").write_text("one")
    assert run().stages["a"].status == "cached"
    (notes / "c.txt").write_text("three")
    assert run().stages["a"].metrics == {"rows": 3}


def test_a_moved_folder_with_the_same_files_is_the_same_input(run, notes, work):
    assert run(READ).code == 0
    notes.rename(work / "moved")
    assert run(READ.replace("notes", "moved")).stages["a"].status == "cached"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("./missing.txt", "no such file or directory: ./missing.txt (p.yaml:4:35)"),
        ("./notes/*.md", "nothing matches ./notes/*.md (p.yaml:4:35)"),
        ("./empty", "empty is empty (p.yaml:4:35)"),
    ],
)
def test_a_missing_input_is_found_before_anything_runs(ref, message, llmctl, spec, notes, work):
    (work / "empty").mkdir()
    stages = f"a: {{uses: make, inputs: {{files: '{ref}'}}}}\n"
    path = spec(stages + "b: {uses: make, with: {rows: 2}}")
    done = llmctl("run", path.name)
    assert done.returncode == 5
    assert message in done.stderr
    assert not list((work / ".llmctl").glob("store/runs/*"))


def test_sources_are_inputs_too(llmctl, work, notes):
    text = "llmctl: 1\nname: p\nsources:\n  corpus: {uri: ./notes}\n"
    text += "stages:\n  a: {uses: make, inputs: {files: sources.corpus}}\n"
    (work / "p.yaml").write_text(text)
    planned = llmctl("plan", "p.yaml")
    assert planned.returncode == 0, planned.stderr
    (work / "p.yaml").write_text(text.replace("./notes", "./note"))
    done = llmctl("run", "p.yaml")
    assert done.returncode == 5
    assert "no such file or directory: ./note (p.yaml:4:" in done.stderr


@pytest.fixture(autouse=True)
def _plugin(fake_stages):
    return fake_stages


def test_artifacts_by_id_and_by_path(run, work):
    made = run("a: {uses: make, output: ./out}").stages["a"].outputs["text"]
    for ref in (made.id, made.id[:15], "./out", f"./{made.path.relative_to(work)}"):
        result = run(f"b: {{uses: upper, inputs: {{text: '{ref}'}}}}")
        assert result.code == 0
        # One key however it is named: the first run made it, the others found it.
        assert result.stages["b"].status == ("done" if ref == made.id else "cached")


def test_an_artifact_of_another_kind(run, llmctl, spec):
    numbers = run("a: {uses: make}").stages["a"].outputs["metrics"].id
    done = llmctl("run", spec(f"b: {{uses: upper, inputs: {{text: '{numbers}'}}}}"))
    assert done.returncode == 5
    assert f"{numbers} is a metrics, wanted dataset.text" in done.stderr


def test_an_edited_copy_is_refused(run, llmctl, work):
    assert run("a: {uses: make, output: ./out}").code == 0
    info = work / "out/dataset_info.json"
    info.write_text(info.read_text().replace("3", "4"))
    run_error = llmctl("show", "./out")
    assert run_error.returncode == 5
    assert f"{info} is damaged" in run_error.stderr


def test_an_input_that_changes_during_the_run_is_not_remembered(run, notes, events, work):
    """The result is kept and used, but the key is not published: the next run does it again."""

    def edit():
        while not list((work / ".llmctl/store/runs").glob("*/logs/a.log")):
            time.sleep(0.01)
        (notes / "b.txt").write_text("changed")

    thread = threading.Thread(target=edit)
    thread.start()
    both = "['./notes/a.txt', './notes/b.txt']"
    result = run(f"a: {{uses: make, inputs: {{files: {both}}}}}\nb: {{uses: upper, inputs: {{text: a}}}}")
    thread.join()
    assert result.code == 0
    texts = [event["text"] for event in events() if event["type"] == "warning"]
    assert texts == [f"{notes / 'b.txt'} changed while the stage ran: the result is kept, but will not be reused"]
    store = Store.open()
    assert store.pointer(result.stages["a"].key) is None
    assert store.pointer(result.stages["b"].key) is not None
