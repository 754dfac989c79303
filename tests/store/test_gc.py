"""Garbage collection: what it keeps, what it takes, and that nobody who works meanwhile notices."""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import time

import pytest

from llmctl.errors import BusyError, InputError
from llmctl.store import Store, collection, names
from llmctl.store.guard import taking
from llmctl.store.locks import running, try_lock
from llmctl.store.reachable import Rules
from llmctl.store.store import Pointer

KEY = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32
RESUME = "sha256:" + "ef" * 32


def pointer(key, **outputs):
    return Pointer(key=key, preimage={"v": 1}, outputs={port: artifact.id for port, artifact in outputs.items()})


@pytest.fixture
def gc(store, call):
    """Run `llmctl gc` with no run kept for its age alone."""
    return lambda *args, days=0, runs=0: call(
        "gc", "--keep-days", days, "--keep-runs", runs, "--store", store.root, "--format", "json", *args
    )


@pytest.fixture
def old(put, aged):
    """An artifact that was committed a while ago: `old("text", days=3)`."""

    def make(text, days=3, **fields):
        artifact = put({"x": text}, **fields)
        aged(days, artifact.path)
        return artifact

    return make


def taken(done, kind="artifact"):
    assert done.code == 0, done.error
    return {row["id"] or os.path.basename(row["path"]) for row in done.json["items"] if row["kind"] == kind}  # noqa: PTH119


def make_run(store, name, aged, days, *, stages=None, events=(), inputs=()):
    folder = store.run(name)
    folder.mkdir(parents=True)
    if stages is not None:
        (folder / "run.json").write_text(json.dumps({"id": name, "stages": stages}))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"torn')
    (folder / "spec.json").write_text(json.dumps({"stages": {"a": {"inputs": {"model": list(inputs)}}}}))
    aged(days, folder)
    return folder


def output(artifact):
    return {"outputs": {"out": {"id": artifact.id, "type": artifact.type}}, "key": ""}


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_without_apply_nothing_is_touched(store, old, gc, call):
    artifact = old("1", stage="sft", type="model.hf")
    assert taken(gc()) == taken(gc()) == {artifact.id}
    assert artifact.path.is_dir()
    assert not (store.root / "trash").exists()
    text = call("gc", "--keep-runs", 0, "--store", store.root).out
    assert text.splitlines()[0].split() == ["WHAT", "STAGE", "COUNT", "SIZE"]
    assert "model.hf  sft" in text
    assert "nothing was touched: add --apply" in text


def test_what_names_and_tags_point_at_stays(store, old, gc, call):
    latest, tagged, free, lost = (old(text) for text in "1234")
    names.write(store, "p", "a[x=1/2]", {"out": (latest.id, "report")}, key="k", run="r")
    names.set_tag(store, "p/a@best", {"id": tagged.id, "type": "report"})
    names.set_tag(store, "team/x@v1", {"id": free.id, "type": "report"})
    assert taken(gc("--apply")) == {lost.id}
    assert set(store.ids()) == {latest.id, tagged.id, free.id}
    call("tag", "--delete", "p/a@best", "--store", store.root)
    assert taken(gc("--apply")) == {tagged.id}


def test_what_was_committed_or_used_within_a_day_stays(store, put, old, gc, aged):
    put({"x": "just now"})
    stamped = put({"x": "moved here by a copy that kept times"}, ended=names.timestamp())
    aged(3, stamped.path)
    hit, got, same, unused = (old(text) for text in "1234")
    store.publish(pointer(KEY, out=hit))
    assert store.lookup(KEY)
    assert store.resolve(got.id)
    assert put({"x": "3"}) == same
    assert taken(gc("--apply")) == {unused.id}


def test_what_the_kept_was_made_from(store, old, gc):
    raw = old("raw")
    side = old("side", type="metrics", key=OTHER)
    text = old("text", key=OTHER, inputs={"files": [raw.id, "sha256:" + "9" * 64]})
    store.publish(pointer(OTHER, text=text, metrics=side))
    later = old("later input")
    old("model", key=KEY, inputs={"text": [text.id]})
    model = old("model", key=RESUME, inputs={"text": [later.id]})  # a later producer of the same bytes
    names.write(store, "p", "a", {"out": (model.id, "report")}, key="k", run="r")
    for artifact in (raw, side, text, later, model):
        os.utime(artifact.path, (0, 0))
    everything = {raw.id, side.id, text.id, later.id}
    assert taken(gc("--keep-lineage", "none")) == everything
    assert taken(gc()) == taken(gc("--keep-lineage", "inputs")) == {side.id, later.id}
    assert taken(gc("--keep-lineage", "all")) == set()


def test_young_runs_and_the_last_ones_keep_their_results(store, old, gc, aged):
    made = [old(str(number)) for number in range(4)]
    for number, (artifact, days) in enumerate(zip(made, (50, 40, 20, 10), strict=True)):
        make_run(store, f"2026-0{number + 1}-01T00-00-00Z-aaaa", aged, days, stages={"a": output(artifact)})
    ids = [artifact.id for artifact in made]
    assert taken(gc(days=30)) == set(ids[:2])
    assert taken(gc(days=30, runs=3)) == set(ids[:1])
    assert taken(gc(days=0, runs=1)) == set(ids[:3])
    assert taken(gc(days=30), "run") == {"2026-01-01T00-00-00Z-aaaa", "2026-02-01T00-00-00Z-aaaa"}
    gc("--apply", days=30)
    assert sorted(path.name[:7] for path in (store.root / "runs").iterdir()) == ["2026-03", "2026-04"]


def test_a_run_that_goes_on_keeps_what_it_has_and_what_it_was_given(store, old, gc, aged):
    made, hit, given, free = (old(text) for text in "1234")
    store.publish(pointer(KEY, out=hit))
    events = [{"type": "artifact", "id": made.id}, {"type": "stage.cached", "key": KEY}]
    for artifact in (made, hit, given, free):
        os.utime(artifact.path, (0, 0))
    make_run(store, "now", aged, 0.5, events=events, inputs=[given.id[:20], "./path", "sha256:xyz"])
    assert taken(gc("--apply")) == {free.id}
    aged(2, store.run("now"))  # the control: it wrote nothing for two days, and holds no lock
    with try_lock(store.lock(RESUME), "now"):
        assert taken(gc()) == set()
    assert taken(gc()) == {made.id, hit.id, given.id}


def test_the_inputs_of_a_stage_at_work_stay(store, old, gc):
    artifact = old("1")
    request = {"key": KEY, "resume": RESUME, "inputs": {"text": [{"id": artifact.id}]}}
    path = store.request(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(request))
    os.utime(path, (0, 0))
    for number in (1, 2):
        with try_lock(store.lock(RESUME, number), "elsewhere"):
            done = gc()
            assert taken(done) == set() and taken(done, "request") == set()
    assert taken(gc()) == {artifact.id}


def test_other_projects_of_a_shared_store_keep_what_they_named(store, old, gc, call, tmp_path, monkeypatch):
    """dvc#2325: a collection in one project took the data of another."""
    ours, theirs = old("ours"), old("theirs")
    for name, artifact in (("one", ours), ("two", theirs)):
        (tmp_path / name / ".llmctl").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        names.write(store, "quickstart", "sft", {"model": (artifact.id, "report")}, key="k", run="r")
    assert store.resolve("quickstart/sft").id == theirs.id  # the second project's run has taken the name
    for artifact in (ours, theirs):
        os.utime(artifact.path, (0, 0))
    done = gc("--apply")
    assert taken(done) == set()
    assert [project["directory"] for project in done.json["projects"]] in (
        [str(tmp_path / "one"), str(tmp_path / "two")], [str(tmp_path / "two"), str(tmp_path / "one")],
    )  # fmt: skip
    shutil.rmtree(tmp_path / "one")
    text = call("gc", "--store", store.root).out
    assert f"{tmp_path / 'one'} used this store and is no more; its results are kept until" in text
    folder = next(
        path for path in store.roots.iterdir() if str(tmp_path / "one") in (path / "project.json").read_text()
    )
    shutil.rmtree(folder)
    assert taken(gc()) == {ours.id}


def test_a_store_of_ones_own_registers_nobody(tmp_path, monkeypatch, put):
    (tmp_path / "project/.llmctl").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    store = Store(tmp_path / "project/.llmctl/store")
    store.create()
    names.write(store, "p", "a", {"out": ("sha256:0", "report")}, key="k", run="r")
    assert not store.roots.exists()


# -- what goes --------------------------------------------------------------------------------------------------------


def test_everything_that_belonged_to_an_artifact_goes_with_it(store, old, gc, aged):
    artifact = old("1", key=KEY)
    old("1", key=OTHER)
    store.publish(pointer(KEY, out=artifact))
    store.signatures(artifact.id).mkdir(parents=True)
    store.signatures(artifact.id).joinpath("a.sig").write_text("x")
    broken = store.key(OTHER)
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    aged(3, artifact.path, store.root / "keys")
    done = gc("--apply")
    kinds = sorted(row["kind"] for row in done.json["items"])
    assert kinds == ["artifact", "key", "key", "record", "signature"]
    left = {path for path in store.root.glob("*/**/*") if "trash" not in path.parts and path.is_file()}
    assert left == {store.root / "locks/gc.lock"}
    assert store.lookup(KEY) is None


def test_trash_is_emptied_after_the_grace(store, old, gc):
    artifact = old("1")
    gc("--apply")
    (lying,) = (store.root / "trash").iterdir()
    assert (lying / "x").read_text() == "1"
    assert taken(gc(), "trash") == set()
    assert taken(gc("--grace", "0s"), "trash") == {lying.name}
    lying.rename(artifact.path)  # it can be taken back
    store.verify(artifact.id)
    os.utime(artifact.path, (0, 0))
    gc("--apply")
    (lying,) = (store.root / "trash").iterdir()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - 8 * 86_400))
    lying.rename(lying.with_name(stamp + lying.name[16:]))
    assert len(taken(gc("--apply"), "trash")) == 1
    assert list((store.root / "trash").iterdir()) == []


def test_now_leaves_nothing_in_the_trash(store, old, gc):
    old("1")
    gc("--apply", "--now")
    assert list((store.root / "trash").iterdir()) == []
    assert list(store.ids()) == []


def work_of(store, key, resume=RESUME, days=0.0, number=1):
    path = store.request(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": key, "resume": resume, "inputs": {}}))
    then = time.time() - days * 86_400
    os.utime(path, (then, then))
    folder = store.work(resume, number)
    (folder / "ckpt").mkdir(parents=True, exist_ok=True)
    (folder / "ckpt/state").write_text("x" * 100)
    return folder


@pytest.mark.parametrize("held", [True, False])
def test_work_of_a_finished_key_goes_at_once(held, store, put, gc):
    folder = work_of(store, KEY)
    store.publish(pointer(KEY, out=put({"x": "1"})))
    with try_lock(store.lock(RESUME), "r") if held else contextlib.nullcontext():
        assert taken(gc("--apply"), "work") == (set() if held else {folder.name})
    assert folder.exists() == held


def test_work_of_an_unfinished_key_stays_two_weeks(store, put, gc, aged):
    folder = work_of(store, KEY)
    aged(13, folder)
    assert taken(gc(), "work") == set()
    aged(15, folder)
    (folder / "ckpt/new").write_text("x")
    assert taken(gc(), "work") == set()
    aged(15, folder)
    assert taken(gc("--apply"), "work") == {folder.name}


def test_work_that_was_taken_up_again_is_unfinished(store, put, gc):
    """max_steps was raised: the same directory belongs to a finished key and to one that was stopped."""
    store.publish(pointer(KEY, out=put({"x": "1"})))
    work_of(store, KEY, days=2)
    folder = work_of(store, OTHER, days=1)
    assert taken(gc(), "work") == set()
    store.publish(pointer(OTHER, out=put({"x": "2"})))
    assert taken(gc(), "work") == {folder.name}


def test_requests_locks_and_leftovers(store, put, gc, aged):
    done, stopped = put({"x": "1"}), "sha256:" + "12" * 32
    store.publish(pointer(KEY, out=done))
    shutil.rmtree(work_of(store, KEY, days=2))
    shutil.rmtree(work_of(store, stopped, resume=OTHER, days=2))
    for key in (RESUME, OTHER):
        with try_lock(store.lock(key)):
            pass
        aged(2, store.lock(key))
    left = store.root / "tmp" / "elsewhere-1-x"
    left.mkdir(parents=True)
    aged(20, left)
    mine = store.staging()
    found = gc("--apply")
    assert taken(found, "request") == {store.request(KEY).name}
    assert taken(found, "lock") == {store.lock(RESUME).name, store.lock(OTHER).name}
    assert taken(found, "tmp") == {left.name}
    assert mine.is_dir() and store.request(stopped).is_file() and not store.lock(OTHER).exists()


def test_a_lock_whose_file_is_removed_still_excludes(store):
    """Open, removed by a collection, then flock: that lock would be one that nobody else can see."""
    path = store.lock(RESUME)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = []
    flock = fcntl.flock

    def remove_once(descriptor, how):
        if not seen:
            seen.append(path.unlink())
        return flock(descriptor, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmctl.store.locks.fcntl.flock", remove_once)
        with try_lock(path, "r") as lock:
            assert lock and path.exists()
            assert try_lock(path) is None
            assert running(path) == "r"
    assert running(path) is None


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7 days", ""])
def test_a_grace_that_is_no_duration(text, call, store):
    done = call("gc", "--grace", text, "--store", store.root)
    assert done.code == 2


def test_looking_into_an_empty_directory_leaves_nothing(call, tmp_path):
    (tmp_path / "empty").mkdir()
    assert call("show", "sha256:" + "0" * 64, "--store", tmp_path / "empty").code == 5
    assert call("gc", "--store", tmp_path / "empty").code == 0
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_empty_store(call, tmp_path):
    done = call("gc", "--apply", "--store", tmp_path / "none")
    assert (done.code, done.out) == (0, "nothing to collect, 0 artifacts stay\n")
    assert not (tmp_path / "none").exists()


# -- beside others ----------------------------------------------------------------------------------------------------


def test_two_collections_do_not_meet(store, old):
    old("1")
    found = collection.plan(store, Rules(days=0, runs=0), grace=0)
    with try_lock(store.root / "locks/gc.lock"), pytest.raises(BusyError, match="another garbage collection"):
        collection.apply(store, found)


@pytest.mark.parametrize("how", ["hit", "name", "commit", "tag"])
def test_what_is_found_between_plan_and_apply_stays(how, store, old, put, call):
    artifact = old("1")
    store.publish(pointer(KEY, out=artifact))
    found = collection.plan(store, Rules(days=0, runs=0), grace=0)
    assert [item.id for item in found.items] == [artifact.id]
    if how == "hit":
        assert store.lookup(KEY)
    elif how == "name":
        store.resolve(artifact.id)
    elif how == "commit":
        put({"x": "1"})
    else:
        assert call("tag", artifact.id, "p/a@best", "--store", store.root).code == 0
    assert collection.apply(store, found) == []
    store.verify(artifact.id)


def test_a_finder_waits_for_the_instant_in_which_something_goes(store, old):
    """The control of the guard: while the collection holds it, a look-up cannot be half-way."""
    artifact = old("1")
    store.publish(pointer(KEY, out=artifact))
    ready, go = os.pipe()
    child = os.fork()  # before the guard is taken: a fork would inherit it
    if child == 0:
        os.read(ready, 1)
        os._exit(0 if store.lookup(KEY) is None else 1)
    with taking(store):
        os.write(go, b"x")
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        artifact.path.rename(store.trash("artifact", "x"))
    assert os.waitpid(child, 0)[1] == 0


def test_racing_users_never_see_an_error(store):
    """Six processes hit or make results while collections run that keep what was used within 0.3 s instead of a day."""
    end = time.monotonic() + 2.0

    def child(seed):
        pid = os.fork()
        if pid == 0:
            try:
                use_until(store, end, random.Random(seed))
            except BaseException:
                os._exit(1)
            os._exit(0)
        return pid

    pids = [child(seed) for seed in range(6)]
    rounds = collected = 0
    rules = Rules(days=0, runs=0, recent=0.3)
    while time.monotonic() < end:
        collected += len(collection.apply(store, collection.plan(store, rules, grace=1e9)))
        rounds += 1
        time.sleep(0.02)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)
    assert rounds > 2 and collected > 5  # it did collect under their hands
    for id in store.ids():
        store.verify(id)


def use_until(store, end, dice):
    """Look up or make one of many results after another; what was found must be readable as long as it is protected."""
    while time.monotonic() < end:
        number = dice.randrange(80)
        key = "sha256:" + f"{number:02x}" * 32
        begun = time.time()
        found = store.lookup(key)
        if found is None:
            directory = store.staging() / "out"
            directory.mkdir()
            (directory / "x").write_text(str(number))
            artifact = store.commit(directory, "report", ["x"], metadata={}, provenance={"key": key})
            directory.parent.rmdir()
            found = store.publish(pointer(key, out=artifact))
        try:
            for id in found.outputs.values():
                assert (store.get(id).path / "x").read_text() == str(number)
        except (InputError, OSError):
            if time.time() - begun < 0.25:
                raise
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_in_the_middle_leaves_a_sound_store(store, old, put, aged):
    """20 collections that are killed; what is left is whole, what is kept is there, and the next one finishes."""
    kept = old("kept")
    names.write(store, "p", "a", {"out": (kept.id, "report")}, key="k", run="r")
    dice = random.Random(3)
    interrupted, whole = 0, 0.0
    for turn in range(20):
        made = [put({"x": f"{turn}/{number}", "y": "y" * 1000}) for number in range(12)]
        for number, artifact in enumerate(made):
            key = "sha256:" + f"{turn:02x}{number:02x}" * 16
            store.publish(pointer(key, out=artifact))
            aged(3, artifact.path, store.key(key))
        aged(3, kept.path)
        begun = time.monotonic()
        if not whole:  # the first one is not killed, but shows how long one takes
            collection.apply(store, collection.plan(store, Rules(days=0, runs=0), grace=0))
            whole = time.monotonic() - begun
            continue
        pid = os.fork()
        if pid == 0:
            collection.apply(store, collection.plan(store, Rules(days=0, runs=0), grace=0))
            os._exit(0)
        time.sleep(dice.uniform(0.0, whole))
        os.kill(pid, signal.SIGKILL)
        interrupted += os.waitpid(pid, 0)[1] != 0
        for directory in store.directories():
            store.verify(f"sha256:{directory.name}")
        for path in (store.root / "keys").glob("*/*.json"):
            found = store.lookup(f"sha256:{path.stem}")
            assert found is None or all(store.get(id) for id in found.outputs.values())
        assert store.resolve("p/a").id == kept.id
    assert interrupted > 5
    aged(3, *store.directories(), store.root / "keys")
    collection.apply(store, collection.plan(store, Rules(days=0, runs=0), grace=0))
    collection.empty_trash(store)
    assert list(store.ids()) == [kept.id]
    assert list((store.root / "trash").iterdir()) == []
    assert list((store.root / "keys").glob("*/*.json")) == []


def test_release_takes_an_ephemeral_output_unless_somebody_needs_it(store, put):
    artifact = put({"x": "1"})
    seen = store.last_use(artifact.id)
    os.utime(artifact.path, ns=(seen + 1, seen + 1))  # found by another run
    assert not collection.release(store, artifact.id, seen)
    seen = store.last_use(artifact.id)
    names.set_tag(store, "p/a@best", {"id": artifact.id, "type": "report"})
    assert not collection.release(store, artifact.id, seen)
    names.delete_tag(store, "p/a@best")
    assert collection.release(store, artifact.id, seen)
    assert not artifact.path.exists() and len(list((store.root / "trash").iterdir())) == 1
    assert not collection.release(store, artifact.id, seen)
