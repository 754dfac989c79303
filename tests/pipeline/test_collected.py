"""Garbage collection beside runs: what a run needs stays or is made again; raising the extent after it starts anew."""

import json
import os
import threading
import time

import pytest

from llmctl.store import Store, collection
from llmctl.store.reachable import Rules

NOTHING_KEPT = Rules(days=0, runs=0, recent=0)


def collect(store, rules=NOTHING_KEPT):
    return collection.apply(store, collection.plan(store, rules, grace=0))


def forget_names(store):
    for path in store.refs.glob("*/*.json"):
        path.unlink()


def test_a_collected_result_is_a_miss(run, actions):
    stages = "a: {uses: make}\nb: {uses: upper, inputs: {text: a}}"
    first = run(stages)
    store = Store.open()
    collect(store)
    run(None)
    assert actions() == {"a": "cached", "b": "cached"}  # the names keep it
    forget_names(store)
    taken = {item.kind for item in collect(store)}
    assert {"artifact", "key", "run"} <= taken
    again = run(None)
    assert (again.code, actions()) == (0, {"a": "run", "b": "run"})
    assert again.stages["b"].outputs["text"].id == first.stages["b"].outputs["text"].id


def test_collections_while_a_pipeline_runs(run, spec, actions):
    """Two collections a second that keep nothing but what is in use, and a pipeline of slow and cached stages."""
    stages = (
        "a: {uses: make}\nb: {uses: upper, inputs: {text: a}, with: {sleep: 0.5}}\nc: {uses: upper, inputs: {text: b}}"
    )
    run(stages, to=["a"])
    store = Store.open()
    forget_names(store)
    over = threading.Event()
    taken = []

    def keep_collecting():
        while not over.is_set():
            for directory in store.directories():  # nothing is recent
                os.utime(directory, (0, 0))
            taken.extend(item.kind for item in collect(store, Rules(days=0, runs=0, recent=5)))
            time.sleep(0.2)

    thread = threading.Thread(target=keep_collecting)
    thread.start()
    try:
        result = run(None)
    finally:
        over.set()
        thread.join()
    assert result.code == 0, result.message
    for stage in result.stages.values():
        for artifact in stage.outputs.values():
            store.verify(artifact.id)


def test_work_kept_for_a_longer_run_goes_with_the_collection(run, work):
    result = run("t: {uses: count, with: {max_steps: 3}}")
    store = Store.open()
    request = json.loads(store.request(result.stages["t"].key).read_text())
    folder = store.work(request["resume"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text("[3, 1]")
    assert [item.path for item in collection.plan(store, Rules(), grace=0).items if item.kind == "work"] == [folder]
    collect(store, Rules())
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_the_winner_of_a_race_that_is_lost_is_made_again(damage, run, actions):
    """Row 5 of what users report: a hit whose artifact is gone, here after the race for its key."""
    stages = "a: {uses: make}"
    result = run(stages)
    path = result.stages["a"].outputs["text"] / "train-00000-of-00001.jsonl.gz"
    path.chmod(0o644)
    path.unlink() if damage == "delete" else path.write_bytes(b"")
    assert run(None).code == 0
    assert actions() == {"a": "run"}
