"""What garbage collection must not take at its edges: few runs, other projects, others that collect meanwhile."""

import errno
import json
import os
import time

import pytest

from llmctl.errors import BusyError
from llmctl.store import Store, collection, names
from llmctl.store.external import read_note
from llmctl.store.locks import try_lock
from llmctl.store.reachable import Rules, kept_runs, run_ids
from llmctl.store.store import Pointer
from llmctl.store.transfer import run_outputs

KEY = "sha256:" + "ab" * 32
RESUME = "sha256:" + "ef" * 32
NONE = Rules(days=0, runs=0)


def make_runs(store, aged, count):
    for number in range(count):
        folder = store.run(f"2026-01-{number + 1:02}")
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        aged(99, folder)


@pytest.mark.parametrize("count", range(7))
def test_the_last_runs_are_kept_however_many_there_are(count, store, aged):
    make_runs(store, aged, count)
    for runs in range(5):
        expected = {f"2026-01-{number + 1:02}" for number in range(count)[max(0, count - runs) :]}
        assert kept_runs(store, Rules(days=1, runs=runs), time.time()) == expected


@pytest.mark.parametrize("stages", [[1], {"a": 1}, {"a": {"outputs": [1]}}, {"a": {"outputs": {"x": 1}}}, 7])
def test_damaged_descriptions_of_runs_lead_nowhere(stages, store):
    store.run("r").mkdir(parents=True)
    for file in ("run.json", "spec.json"):
        (store.run("r") / file).write_text(json.dumps({"stages": stages, "id": "r"}))
    (store.run("r") / "events.jsonl").write_text("7\n")
    assert run_ids(store, "r") == set()
    assert run_outputs({"stages": stages}) == []


# -- beside others ----------------------------------------------------------------------------------------------------


def test_what_vanishes_while_it_is_looked_at_is_no_error(store, put, aged, monkeypatch):
    """Another collection takes each thing at the instant before this one asks for its age."""
    artifact = put({"x": "1"})
    for kind in ("keys/ab", "requests/ab", "externals", "locks", "trash", "tmp", "work", "runs/r"):
        path = store.root / kind / "f.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (store.root / "locks/f.json").rename(store.root / "locks/f.lock")
    aged(
        40, artifact.path, *(store.root / kind for kind in ("keys", "requests", "externals", "locks", "trash", "runs"))
    )
    aged(40, store.root / "work", store.root / "tmp")
    items = collection.plan(store, NONE, grace=0).items
    assert {item.kind for item in items} == {"artifact", "external", "key", "lock", "run", "tmp", "trash", "work"}
    stat, lstat = type(store.root).stat, type(store.root).lstat

    def gone(real):
        def look(self, **options):
            if self.name in ("f.json", "f.lock", "r", artifact.path.name):
                raise FileNotFoundError(errno.ENOENT, "gone", str(self))
            return real(self, **options)

        return look

    monkeypatch.setattr(type(store.root), "stat", gone(stat))
    monkeypatch.setattr(type(store.root), "lstat", gone(lstat))
    collection.plan(store, NONE, grace=0)


def test_collections_side_by_side_and_ephemeral_runs_end_well(store, put, aged):
    """Four processes plan and take at the same time as artifacts are made and released; none meets an error."""
    end = time.monotonic() + 1.5
    pids = []
    for seed in range(4):
        pid = os.fork()
        if pid == 0:
            code = 0
            try:
                while time.monotonic() < end:
                    if seed == 3:
                        made = [put({"x": os.urandom(8).hex()}) for _ in range(10)]
                        aged(3, *(artifact.path for artifact in made))
                        for artifact in made[:5]:
                            collection.release(store, artifact.id, store.last_use(artifact.id))
                    else:
                        try:
                            collection.collect(store, NONE, grace=0)
                        except BusyError:
                            collection.plan(store, NONE, grace=0)
            except BaseException:
                code = 1
            os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4


def test_collecting_holds_its_lock_while_it_plans(store, monkeypatch):
    real = collection.plan

    def planned(*args, **options):
        assert try_lock(store.root / "locks/gc.lock") is None
        return real(*args, **options)

    monkeypatch.setattr(collection, "plan", planned)
    collection.collect(store, NONE, grace=0)
    with try_lock(store.root / "locks/gc.lock"), pytest.raises(BusyError):
        collection.collect(store, NONE, grace=0)


# -- looked at again --------------------------------------------------------------------------------------------------


def ask(store, key, **inputs):
    path = store.request(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {port: [{"id": id}] for port, id in inputs.items()}
    path.write_text(json.dumps({"key": key, "resume": RESUME, "inputs": rows}))


@pytest.mark.parametrize("how", ["touched", "asked", "nothing"])
def test_work_is_looked_at_again_before_it_goes(how, store, put, aged):
    """`touched`: somebody went on with unfinished work. `asked`: finished work is needed for more steps."""
    work = store.work(RESUME)
    work.mkdir(parents=True)
    (work / "checkpoint").write_text("x")
    ask(store, KEY)
    if how == "asked":
        artifact = put({"x": "1"})
        store.publish(Pointer(key=KEY, preimage={}, outputs={"out": artifact.id}))
    aged(20, work, store.root / "requests")
    found = collection.plan(store, NONE, grace=0)
    assert [item.path for item in found.items if item.kind == "work"] == [work]
    if how == "touched":
        (work / "checkpoint").write_text("y")
    if how == "asked":
        ask(store, "sha256:" + "cd" * 32)
    taken = {item.kind for item in collection.apply(store, found)}
    assert ("work" in taken) == (how == "nothing") == (not work.exists())


def test_notes_on_inputs_that_are_still_needed_stay(store, put, aged):
    ids = {name: f"sha256:{number:064}" for number, name in enumerate(("first", "later", "asked", "nobody"))}
    for id in ids.values():
        path = store.external(id)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"path": "/x"}))
    put({"x": "1"}, key=KEY, inputs={"a": [ids["first"]]})
    put({"x": "1"}, key=RESUME, inputs={"a": [ids["later"]]})  # a later producer of the same bytes
    ask(store, KEY, text=ids["asked"])
    aged(3, store.root / "externals")
    collection.collect(store, NONE, grace=0)
    assert {name for name, id in ids.items() if read_note(store, id)} == {"first", "later", "asked"}


# -- ephemeral outputs ------------------------------------------------------------------------------------------------


def test_what_another_project_has_named_is_not_released(store, put, call, tmp_path, monkeypatch):
    """Two projects with one pipeline's name and one store: what the first has named is not the second's to take."""
    artifact, refs = put({"x": "1"}), {"text": ("", "report")}
    refs["text"] = (artifact.id, "report")
    for project in ("a", "b"):
        (tmp_path / project / ".llmctl").mkdir(parents=True)

    def write(project):
        monkeypatch.chdir(tmp_path / project)
        names.write(store, "p", "s", refs, key=KEY, run="r")

    def release():
        return collection.release(store, artifact.id, store.last_use(artifact.id), stage="p/s", key=KEY)

    store.publish(Pointer(key=KEY, preimage={}, outputs={"text": artifact.id}))
    write("a")
    write("b")
    assert not release()
    assert call("show", "p/s", "--store", store.root).code == 0
    for path in (store.roots).glob("*/p/*.json"):
        if "/a" in json.loads((path.parent.parent / "project.json").read_text())["directory"]:
            path.unlink()
    assert release()  # the control: it was that name


def test_names_in_the_own_store_of_another_project_hold(put, tmp_path, monkeypatch, call):
    for project in ("a", "b"):
        (tmp_path / project / ".llmctl").mkdir(parents=True)
    theirs = Store(tmp_path / "a/.llmctl/store")
    theirs.create()
    (theirs.staging() / "x").write_text("1")
    artifact = theirs.commit(next((theirs.root / "tmp").iterdir()), "report", ["x"], metadata={}, provenance={})
    monkeypatch.chdir(tmp_path / "a")
    names.write(theirs, "p", "s", {"text": (artifact.id, "report")}, key=KEY, run="r")
    seen = theirs.last_use(artifact.id)
    monkeypatch.chdir(tmp_path / "b")
    assert not collection.release(theirs, artifact.id, seen, stage="p/s", key=KEY)
    monkeypatch.chdir(tmp_path / "a")
    assert collection.release(theirs, artifact.id, seen, stage="p/s", key=KEY)


def test_what_a_stage_at_work_was_given_or_another_key_leads_to_is_not_released(store, put):
    artifact = put({"x": "1"})
    seen = store.last_use(artifact.id)
    ask(store, KEY, text=artifact.id)
    with try_lock(store.lock(RESUME)):
        assert not collection.release(store, artifact.id, seen)
    other = Pointer(key="sha256:" + "cd" * 32, preimage={}, outputs={"out": artifact.id})
    store.publish(other)
    assert not collection.release(store, artifact.id, seen, key=KEY)
    assert collection.release(store, artifact.id, seen, key=other.key)


# -- what it says -----------------------------------------------------------------------------------------------------


def test_it_says_what_was_moved_and_what_was_deleted(store, put, aged, call):
    aged(3, put({"x": "1" * 5000}).path)
    old = store.trash("artifact", "x")
    old.mkdir()
    (old / "x").write_text("2" * 3000)
    old.rename(store.root / "trash/20200101T000000Z--artifact--00000000--x")
    done = call("gc", "--apply", "--keep-runs", 0, "--store", store.root)
    assert done.out.splitlines()[-1] == (
        "2.9 KiB deleted, 4.9 KiB moved to the trash; `llmctl gc --apply --now` empties it; 0 artifacts stay"
    )
    done = call("gc", "--apply", "--now", "--store", store.root, "--format", "json")
    assert [row["deleted"] for row in done.json["items"]] == [True]
    assert list((store.root / "trash").iterdir()) == []


def test_days_are_a_number(call):
    done = call("gc", "--keep-days", "nan")
    assert done.code == 2


def test_an_artifact_under_the_name_of_another_is_no_result(store, put):
    """A copy under a wrong id is a miss, and is replaced when the right bytes come."""
    one, other = put({"x": "1"}), put({"y": "2"})
    store.publish(Pointer(key=KEY, preimage={}, outputs={"out": other.id}))
    assert store.lookup(KEY)
    for path in [*other.path.iterdir(), other.path]:
        path.unlink() if path.is_file() else path.rmdir()
    one.path.rename(other.path)
    assert store.lookup(KEY) is None
    assert "holds sha256:" in call_error(lambda: store.get(other.id))
    assert put({"y": "2"}).id == other.id and store.get(other.id)


def call_error(work):
    with pytest.raises(Exception, match="is damaged") as error:
        work()
    return str(error.value)


def test_what_was_thrown_away_is_taken_back_with_its_key(store, put, aged, call):
    """As docs/store.md says: the artifact alone is there again, but no cached result."""
    artifact = put({"x": "1"})
    store.publish(Pointer(key=KEY, preimage={}, outputs={"out": artifact.id}))
    aged(3, artifact.path, store.root / "keys")
    assert call("gc", "--apply", "--keep-runs", 0, "--store", store.root).code == 0
    parts = {path.name.split("--")[1]: (path, path.name.split("--")[3]) for path in (store.root / "trash").iterdir()}
    path, name = parts["artifact"]
    path.rename(store.root / "artifacts/sha256" / name[:2] / name)
    assert call("tag", artifact.id, "p/a@kept", "--store", store.root).code == 0
    assert store.lookup(KEY) is None
    path, name = parts["key"]
    path.rename(store.root / "keys" / name[:2] / name)
    assert store.lookup(KEY)
    aged(3, artifact.path)
    call("gc", "--apply", "--keep-runs", 0, "--store", store.root)
    assert store.lookup(KEY)
