"""The options of `llmctl run` and `llmctl plan` that change a whole run, typed as a user types them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llmctl.pipeline.commands import spec_store
from llmctl.spec.resolved import Pipeline

TWO = """
a: {uses: make}
b: {uses: upper, inputs: {text: a}, with: {sleep: 0.7}}
c: {uses: count, with: {max_steps: 40, pause: 0.05}, inputs: {text: a}}
"""


@pytest.fixture(autouse=True)
def _plugin(fake_stages):
    return fake_stages


@pytest.mark.slow
def test_from_and_jobs(llmctl, spec, events, actions):
    spec(TWO)
    done = llmctl("run", "p.yaml", "--from", "b")
    assert done.returncode == 5
    assert "error: `a` comes before `b` and has no result: new" in done.stderr
    assert llmctl("plan", "p.yaml", "--from", "b").returncode == 5
    assert llmctl("run", "p.yaml", "--jobs", "2").returncode == 0
    found = {(e["type"], e.get("stage")): e["seq"] for e in events()}
    assert found["stage.start", "c"] < found["stage.end", "b"] and found["stage.start", "b"] < found["stage.end", "c"]
    assert llmctl("run", "p.yaml", "--from", "b", "--set", "b.mark=x").returncode == 0
    assert actions() == {"a": "cached", "b": "run"}
    planned = llmctl("plan", "p.yaml", "--from", "c", "--format", "json")
    assert [row["stage"] for row in json.loads(planned.stdout)] == ["a", "c"]
    # What lies before is only looked up, also where the spec wants it made anew each time.
    anew = ("run", "p.yaml", "--from", "b", "--set", "stages.a.cache=refresh", "--set", "b.mark=y")
    assert llmctl(*anew).returncode == 0
    assert actions() == {"a": "cached", "b": "run"}


def test_results_of_another_machine_do_not_count_if_asked_so(llmctl, spec):
    spec("a: {uses: make}")

    def plan(*args):
        (row,) = json.loads(llmctl("plan", "p.yaml", "--format", "json", *args).stdout)
        return row["action"]

    assert llmctl("run", "p.yaml", "--strict-env").returncode == 0
    assert (plan("--strict-env"), plan()) == ("cached", "run")
    assert llmctl("run", "p.yaml").returncode == 0
    assert (plan("--strict-env"), plan()) == ("cached", "cached")


def test_the_store_of_a_spec(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMCTL_STORE", raising=False)
    pipeline = Pipeline(name="p", file=None, base=tmp_path, stages={})
    assert spec_store(pipeline) is None
    asks = dataclasses.replace(pipeline, store=str(tmp_path / "s"))
    assert spec_store(asks) == tmp_path / "s"
    monkeypatch.setenv("LLMCTL_STORE", str(tmp_path / "other"))
    assert spec_store(asks) is None
