"""Several stages at once: slots of the machine, order of events, remaining time, stopping, failing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmctl.launch.signals import Stop
from llmctl.pipeline import machine
from llmctl.pipeline.durations import RunProgress
from llmctl.pipeline.events import EventLog
from llmctl.pipeline.slots import Slots
from llmctl.spec.resolved import Resources

THREE = """
a: {uses: make}
x: {uses: upper, inputs: {text: a}, with: {sleep: 0.8, mark: x}}
y: {uses: upper, inputs: {text: a}, with: {sleep: 0.8, mark: y}}
"""


def wants(**resources):
    return SimpleNamespace(resources=Resources(**resources))


def spans(events):
    """Stage → (number of its start event, number of its end event)."""
    started = {e["stage"]: e["seq"] for e in events if e["type"] == "stage.start"}
    return {e["stage"]: (started[e["stage"]], e["seq"]) for e in events if e["type"] == "stage.end"}


def overlap(one, other):
    return one[0] < other[1] and other[0] < one[1]


# -- slots ------------------------------------------------------------------------------------------------------------


def test_what_is_taken_is_not_there_until_it_is_given_back():
    slots = Slots(3, cpus=4, devices=["4", "GPU-7"], memory=100)
    first = slots.take(wants(cpus=2, gpus=1, memory=60))
    assert (first.cpus, first.devices, first.memory) == (2, ("4",), 60)
    assert slots.take(wants(memory=50)) is None
    assert slots.take(wants(gpus=2)) is None
    assert slots.take(wants(cpus=3)) is None
    second = slots.take(wants(gpus=1))  # names no cores: one
    assert (second.cpus, second.devices) == (1, ("GPU-7",))
    third = slots.take(wants())
    assert slots.take(wants()) is None  # three jobs
    slots.give_back(third)
    slots.give_back(first)
    assert slots.take(wants(gpus=1, cpus=2, memory=100)).devices == ("4",)


@pytest.mark.parametrize(
    ("visible", "there", "devices"),
    [
        (None, 3, ["0", "1", "2"]),
        ("", 3, []),
        ("-1", 3, []),
        ("2,0", 3, ["2", "0"]),
        ("1,7,0", 3, ["1"]),
        ("GPU-ab12,GPU-cd34", 2, ["GPU-ab12", "GPU-cd34"]),
        ("0,1", 0, []),
    ],
)
def test_devices_that_the_user_hides_stay_hidden(visible, there, devices, monkeypatch):
    monkeypatch.setattr(machine.Path, "glob", lambda self, pattern: iter(range(there)))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.devices() == devices


def test_each_stage_sees_the_gpus_that_it_was_given(run, monkeypatch):
    monkeypatch.setattr(machine, "devices", lambda: ["5", "GPU-7"])
    monkeypatch.setattr(machine, "cores", lambda: 4)
    stages = "".join(
        f"{id}: {{uses: wrong, with: {{how: env, size: {size}}}, resources: {{gpus: 1}}}}\n"
        for size, id in enumerate("xy")
    )
    result = run(stages, jobs=2)
    assert result.code == 0
    seen = [json.loads((result.stages[id].outputs["result"] / "env.json").read_text()) for id in "xy"]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in seen] == ["5", "GPU-7"]


# -- runs -------------------------------------------------------------------------------------------------------------


def test_independent_stages_run_at_once(run, events, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    result = run(THREE, jobs=2)
    assert result.code == 0
    found = spans(events())
    assert overlap(found["x"], found["y"]) and found["a"][1] < min(found["x"][0], found["y"][0])
    assert [event["seq"] for event in events()] == list(range(len(events())))
    assert list(result.stages) == ["a", "x", "y"]


@pytest.mark.parametrize("why", ["cpus", pytest.param("memory", marks=pytest.mark.slow)])
def test_a_stage_for_which_there_is_no_room_waits(why, run, events, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 1 if why == "cpus" else 4)
    monkeypatch.setattr(machine, "memory", lambda: 6 << 30)
    stages = THREE.replace("}\n", ", resources: {memory: 4GiB}}\n") if why == "memory" else THREE
    result = run(stages.replace("sleep: 0.8", "sleep: 0.1"), jobs=3)
    assert result.code == 0
    found = spans(events())
    assert not overlap(found["x"], found["y"])


def test_running_stages_end_and_commit_after_a_failure(run, actions, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    stages = THREE.replace(
        "x: {uses: upper, inputs: {text: a}, with: {sleep: 0.8, mark: x}}", "x: {uses: wrong, needs: [a]}"
    )
    result = run(stages + "z: {uses: count, inputs: {text: y}}", jobs=2)
    assert (result.code, result.message) == (1, "`x`: ValueError: what happened")
    assert {id: stage.status for id, stage in result.stages.items()} == {
        "a": "done", "x": "failed", "y": "done", "z": "skipped",
    }  # fmt: skip
    assert run(jobs=2, keep_going=True).code == 1
    assert actions() == {"a": "cached", "x": "run", "y": "cached", "z": "run"}


def test_a_request_to_stop_reaches_all_running_stages(run, events, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    stages = "".join(f"{id}: {{uses: count, with: {{max_steps: 5000, pause: 0.02, start: {n}}}}}\n"
                     for n, id in enumerate("xyz"))  # fmt: skip
    with Stop() as stop:
        running = set()

        def emit(event):
            if event["type"] == "stage.progress" and event["step"] > 2:  # it has asked whether to stop by then
                running.add(event["stage"])
                if len(running) == 2 and not stop.requests:
                    stop.request(143)

        result = run(stages, jobs=2, stop=stop, emit=emit)
    assert result.code == 143
    assert [stage.status for stage in result.stages.values()] == ["stopped", "stopped", "skipped"]
    assert sorted(e["stage"] for e in events() if e["type"] == "stage.checkpoint") == ["x", "y"]


def test_the_second_request_ends_all_of_them_at_once(run, work, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    pids = [work / "x.pid", work / "y.pid"]
    stages = "".join(f"{path.stem}: {{uses: wrong, with: {{how: deaf, path: {path}}}}}\n" for path in pids)
    with Stop() as stop:

        def tick():
            if stop.requests < 2 and all(path.exists() and path.read_text() for path in pids):
                stop.request(130)

        result = run(stages, jobs=2, stop=stop, tick=tick)
    assert result.code == 130
    assert [stage.status for stage in result.stages.values()] == ["stopped", "stopped"]
    assert not any(Path(f"/proc/{path.read_text()}").exists() for path in pids)


def test_two_stages_with_the_same_key_do_not_get_in_each_others_way(run, actions, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    stages = "x: {uses: make}\ny: {uses: make, with: {threads: 2}}"
    assert run(stages, jobs=2, on_busy="fail").code == 0
    assert sorted(actions().values()) == ["cached", "run"]


def test_a_bug_in_the_runner_leaves_no_process(run, monkeypatch, work):
    def broken(self, spec, result):
        raise ZeroDivisionError

    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr("llmctl.pipeline.settlement.Settlement.settle", broken)
    stages = "x: {uses: make}\ny: {uses: count, with: {max_steps: 5000, pause: 0.02}}"
    before = threading.active_count()  # servers of other tests may still be closing
    with pytest.raises(ZeroDivisionError):
        run(stages, jobs=2)
    assert threading.active_count() <= before


# -- events and time --------------------------------------------------------------------------------------------------


def test_events_of_many_threads_have_one_order(tmp_path):
    handed_on = []
    log = EventLog("r", tmp_path, handed_on.append)

    def tell(name):
        for number in range(200):
            log("metric", stage=name, name="n", value=number)

    threads = [threading.Thread(target=tell, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert lines == handed_on
    assert [event["seq"] for event in lines] == list(range(800))
    for name in "abcd":
        assert [event["value"] for event in lines if event["stage"] == name] == list(range(200))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 800


class Known:
    def __init__(self, seconds):
        self.seconds = seconds

    def expected(self, spec):
        return self.seconds.get(spec.id)


def test_remaining_time_is_shared_by_the_jobs():
    specs = [SimpleNamespace(id=id, dependencies=needs) for id, needs in
             (("a", ()), ("b", ()), ("c", ()), ("d", ("c",)))]  # fmt: skip
    now = 100.0

    def progress(jobs, seconds):
        return RunProgress(specs, set(), Known(seconds), jobs, lambda: now)

    ten = dict.fromkeys("abcd", 10.0)
    assert progress(1, ten).fields() == {"done": 0, "total": 4, "eta_s": 40.0}
    assert progress(2, ten).fields()["eta_s"] == 20.0
    assert progress(9, ten).fields()["eta_s"] == 20.0  # c and d follow each other
    assert progress(2, {"a": 10.0}).fields()["eta_s"] == 20.0  # like the average
    assert progress(2, {}).fields()["eta_s"] is None
    two = progress(2, ten)
    two.start("a")
    two.start("c")
    now = 105.0
    two.step("a", {"step": 8, "total": 10})
    assert two.fields()["eta_s"] == 15.0  # half of 1.25 + 10 + 5 + 10, but no less than c and d take
    two.end("c", 6.0)
    two.end("a", 6.0)
    assert two.fields() == {"done": 2, "total": 4, "eta_s": 10.0}
