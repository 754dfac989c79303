"""`ephemeral: true`: bytes that nothing in the run needs any more are collected, their ids still count."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llmctl.pipeline.commands import plan_notes
from llmctl.pipeline.execution import Executor
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.plan import Planner
from llmctl.pipeline.report import render
from llmctl.pipeline.summary import summary
from llmctl.registry import discover
from llmctl.spec.pipeline import load_pipeline
from llmctl.store import Store
from llmctl.store.commit import replace_json

CHAIN = """
a: {uses: make}
b: {uses: upper, inputs: {text: a}}
c: {uses: upper, inputs: {text: b}, with: {mark: c}}
d: {uses: score, inputs: {text: b}, gates: [{metric: score, baseline: b.metrics, max_drop: 9}]}
"""


def ephemeral(pipeline, **fields):
    stage = dataclasses.replace(pipeline.stages["b"], ephemeral=True, **fields)
    return dataclasses.replace(pipeline, stages={**pipeline.stages, "b": stage})


def bytes_of(result, stage, port="text"):
    """Whether the store holds the bytes that a key names."""
    pointer = Store.open().pointer(result.stages[stage].key)
    return Store.open().artifact(pointer.outputs[port]).is_dir()


def test_bytes_go_when_the_last_reader_is_done_and_come_back_when_needed(run, actions, events):
    gated = CHAIN.replace("gates: [{metric: score, baseline: b.metrics, max_drop: 9}]", "with: {name: rows}")
    result = run(gated, change=ephemeral)
    assert result.code == 0
    assert {id: bytes_of(result, id) for id in "abc"} == {"a": True, "b": False, "c": True}
    assert bytes_of(result, "b", "metrics")  # small, and gates read them
    order = [(e["type"], e.get("stage")) for e in events() if e["type"] in ("stage.end", "log")]
    assert order.index(("log", "b")) > order.index(("stage.end", "d"))
    assert result.stages["b"].collected and "collected" in summary(result)
    assert "collected" in render(load_pipeline("p.yaml", registry=discover()), result)
    again = run(None, change=ephemeral)
    assert again.code == 0
    assert actions() == dict.fromkeys("abcd", "cached")
    assert not bytes_of(again, "b")
    registry = discover()
    pipeline = ephemeral(load_pipeline("p.yaml", registry=registry))
    specs = list(pipeline.stages.values())
    planned = Planner(pipeline, Store.open(), registry).plan(specs, Inputs(pipeline, Store.open()))
    notes = {decision.id: plan_notes(decision, Store.open()) for decision in planned}
    assert notes["b"] == ["its bytes were collected (ephemeral); nothing needs them"] and notes["a"] == []
    # Another `c` must read the bytes of `b`, so `b` is made again, and collected again.
    other = run(None, "c.mark=x", change=ephemeral)
    assert other.code == 0
    assert actions() == {"a": "cached", "b": "run", "c": "run", "d": "cached"}
    (planned,) = [event["stages"] for event in events() if event["type"] == "plan"]
    assert planned[1]["why"] == ["`c` needs its bytes again (ephemeral)"]
    assert not bytes_of(other, "b")
    assert other.stages["b"].outputs["metrics"].type == "metrics"
    # The control: without the word its bytes stay, and a run without them makes them.
    plain = run(None)
    assert actions() == {"a": "cached", "b": "run", "c": "cached", "d": "cached"} and bytes_of(plain, "b")


@pytest.mark.parametrize(
    "by",
    [
        "tag",
        "key",
        "project",
        pytest.param("output", marks=pytest.mark.slow),
        pytest.param("name", marks=pytest.mark.slow),
    ],
)
def test_what_something_else_holds_stays(by, run, work):
    assert run(CHAIN, to=["b"]).code == 0
    store = Store.open()
    ref = json.loads((store.refs / "p/b.text.json").read_text())
    fields = {"tag": {"tag": "best"}, "output": {"output": work / "out"}}.get(by, {})
    if by == "name":
        replace_json(store, store.refs / "q/other.text.json", ref)
    if by == "project":  # another one whose pipeline and stage have the same names
        replace_json(store, store.roots / f"{1:016}/p/b.text.json", ref)
    if by == "key":
        pointer = store.pointer(ref["key"])
        store.publish(dataclasses.replace(pointer, key=f"sha256:{1:064}"))
    result = run(None, change=lambda p: ephemeral(p, **fields), to=["c"])
    assert result.code == 0
    assert bytes_of(result, "b")


def test_a_stage_that_nobody_reads_is_kept(run):
    result = run(CHAIN, change=ephemeral, to=["b"])
    assert result.code == 0 and bytes_of(result, "b")


def test_a_reader_that_fails_keeps_the_bytes_for_the_next_run(run):
    broken = CHAIN.replace("c: {uses: upper, inputs: {text: b}, with: {mark: c}}", "w: {uses: wrong, needs: [b]}")
    broken += "c: {uses: upper, inputs: {text: b}, needs: [w]}"
    result = run(broken, change=ephemeral, to=["c"])
    assert result.code == 1 and bytes_of(result, "b")


def test_another_run_makes_and_collects_it_while_this_one_waits(run, monkeypatch):
    """What waits for the lock of `b` finds it cached and collected: its ids are enough for what is cached, too."""
    acquire, others = Executor._acquire, []

    def beaten(self, spec, keys):
        if spec.id == "b" and not others:
            others.append(None)
            others[0] = run(change=ephemeral)
        return acquire(self, spec, keys)

    monkeypatch.setattr(Executor, "_acquire", beaten)
    ungated = CHAIN.replace("gates: [{metric: score, baseline: b.metrics, max_drop: 9}]", "with: {name: rows}")
    result = run(ungated, change=ephemeral)
    assert others[0].code == 0 and others[0].stages["b"].collected
    assert result.code == 0
    assert {id: stage.status for id, stage in result.stages.items()} == {
        "a": "done", "b": "cached", "c": "cached", "d": "cached"
    }  # fmt: skip
