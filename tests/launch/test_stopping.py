"""Requests to stop by a file: `llmctl stage stop`, exit 75, and the next run that goes on."""

from __future__ import annotations

import json
import time

import pytest

from llmctl.launch import stopping
from llmctl.launch.stopping import StopFlag
from llmctl.store import Store

SPEC = "max_steps: 600, pause: 0.02"


def wait_for(condition, seconds=20.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)
    return found


def key(work):
    (path,) = (work / ".llmctl/store/requests").glob("*/*.json")
    return f"sha256:{path.stem}"


def events(work):
    latest = max((work / ".llmctl/store/runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(line) for line in (latest / "events.jsonl").read_text().splitlines()]


def value(work, store):
    return json.loads((Store(work / store).resolve("p/w.result") / "value.json").read_text())


def test_a_stop_file_means_checkpoint_and_exit_75(llmctl, start, one, work):
    spec = one("count", SPEC)
    process = start("run", spec)
    state = wait_for(lambda: list((work / ".llmctl/store/work").glob("*/state.json")))[0]
    asked = llmctl("stage", "stop", "--key", key(work), "--store", ".llmctl/store")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "", "")
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "with a checkpoint\n  hint: run the same command again" in stderr
    (end,) = [event for event in events(work) if event["type"] == "stage.end"]
    assert (end["code"], end["stopped"]) == (75, True)
    reached = json.loads(state.read_text())[0]
    assert 0 < reached < 600
    assert (state.parent / "STOP").exists()  # nobody has taken it back; the next run does
    again = llmctl("run", spec, "--set", "w.pause=0")  # how fast is in no key
    assert again.returncode == 0, again.stderr
    assert f"continuing from step {reached}" in again.stderr
    assert not (state.parent / "STOP").exists()
    assert llmctl("run", spec, "--set", "w.pause=0", "--store", "straight").returncode == 0
    assert value(work, ".llmctl/store") == value(work, "straight")


def test_a_request_can_be_taken_back(llmctl, one, work):
    assert llmctl("run", one("count", "max_steps: 2")).returncode == 0
    name = key(work)
    assert llmctl("stage", "stop", "--key", name, "--store", ".llmctl/store").returncode == 0
    (file,) = (work / ".llmctl/store/work").glob("*/STOP")
    assert llmctl("stage", "stop", "--clear", "--key", name, "--store", ".llmctl/store").returncode == 0
    assert not file.exists()
    unknown = llmctl("stage", "stop", "--key", f"sha256:{0:064}", "--store", ".llmctl/store")
    assert unknown.returncode == 5
    assert "there is no request" in unknown.stderr


def test_every_runner_of_a_key_is_asked(tmp_path):
    store = Store(tmp_path / "s")
    store.work("sha256:ab", 2).mkdir(parents=True)
    store.work("sha256:abc").mkdir()
    stopping.ask(store, "sha256:ab")
    assert sorted(path.parent.name for path in store.root.glob("work/*/STOP")) == ["ab", "ab.2"]
    stopping.clear(store, "sha256:ab")
    assert list(store.root.glob("work/*/STOP")) == []
    stopping.clear(store, "sha256:cd")  # nothing there


def test_the_file_is_looked_for_at_most_twice_a_second(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    monkeypatch.setattr(stopping.Path, "exists", lambda self: looked.append(self) or len(looked) > 2)
    now = 0.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    flag = StopFlag(tmp_path)
    for step in range(200):
        now = step / 100
        if flag():
            break
    assert now == pytest.approx(1.0, abs=0.02)
    assert len(looked) == 3
    assert flag()  # once asked, it stays


def test_a_stage_that_never_asks_is_ended_by_the_file_too(llmctl, start, work):
    (work / "p.yaml").write_text(
        "llmctl: 1\nname: p\nstages:\n  a: {uses: make}\n  b: {uses: upper, inputs: {text: a}, with: {sleep: 60}}\n"
    )
    process = start("run", "p.yaml")
    requests = work / ".llmctl/store/requests"

    def running():
        return [r for r in map(json.loads, (p.read_text() for p in requests.glob("*/*.json"))) if r["instance"] == "b"]

    (request,) = wait_for(lambda: requests.exists() and running())
    wait_for(lambda: any(event["type"] == "stage.progress" for event in events(work)))
    assert llmctl("stage", "stop", "--key", request["key"], "--store", ".llmctl/store").returncode == 0
    process.communicate(timeout=20)
    assert process.returncode == 75
