"""A rank that hangs is named with its phase; one that is only slow is not."""

from __future__ import annotations

import json
import time

import pytest

from llmctl.launch.heartbeats import AFTER, BEGINNING, LEAST, TIMES, Heartbeat, Watch, beats
from llmctl.store import Store


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def step(ranks, number, clock, *, seconds=1.0, only=None):
    """All ranks, or those of `only`, go through a step."""
    for phase in ("data", "gradients", "optimizer"):
        clock.now += seconds / 3
        for rank, heartbeat in enumerate(ranks):
            if only is None or rank in only:
                heartbeat.enter(phase, number)


def test_the_rank_that_hangs_is_named_with_its_phase(tmp_path, clock):
    watch = Watch(tmp_path, clock)
    ranks = [Heartbeat(tmp_path, rank, clock) for rank in range(3)]
    for number in range(1, 6):
        step(ranks, number, clock)
    for rank in (0, 2):
        ranks[rank].enter("data", 6)
        ranks[rank].enter("gradients", 6)
    ranks[1].enter("data", 6)
    clock.now += LEAST - 1
    assert watch.look() == ""
    clock.now += 3
    told = watch.look()
    assert told.startswith("rank 1 on ") and "hangs: for 2:02 min in `data` of step 6" in told
    assert told.endswith("2 others wait in `gradients`")
    clock.now += 60
    assert watch.look() == ""  # said once
    ranks[1].enter("gradients", 6)
    clock.now += 3
    assert watch.look() == "all ranks go on"


def test_a_slow_run_is_none_that_hangs(tmp_path, clock):
    watch = Watch(tmp_path, clock)
    ranks = [Heartbeat(tmp_path, rank, clock) for rank in range(2)]
    clock.now += BEGINNING - 5  # a long compilation
    assert watch.look() == ""
    for number in range(1, 4):
        step(ranks, number, clock, seconds=90)
        assert watch.look() == ""
    # Phases of half a minute: what would be a hang of another run is none of this one.
    clock.now += LEAST + 60
    assert watch.look() == ""
    clock.now += TIMES * 30
    assert "ranks 0, 1" in watch.look()


def test_one_rank_that_moves_is_enough(tmp_path, clock):
    watch = Watch(tmp_path, clock)
    ranks = [Heartbeat(tmp_path, rank, clock) for rank in range(2)]
    for number in range(1, 200):
        step(ranks, number, clock, seconds=2, only=None if number < 5 else {0})
        assert watch.look() == ""


def test_what_other_attempts_left_is_passed_over(tmp_path, clock):
    stale = Heartbeat(tmp_path, 0, clock)
    stale.enter("gradients", 5)
    clock.now += 10_000
    assert Watch(tmp_path, clock).look() == ""
    (tmp_path / "heartbeats/rank-7.json").write_text("{")
    assert [beat.rank for beat in beats(tmp_path)] == [0]
    stale.close()
    stale.close()
    assert beats(tmp_path) == []


def test_a_beat_costs_next_to_nothing(tmp_path):
    heartbeat = Heartbeat(tmp_path)
    begun = time.process_time()
    for number in range(500):
        heartbeat.enter("gradients", number)
    assert (time.process_time() - begun) / 500 < 5e-4
    heartbeat.close()


HANGS = """
import time
from llmctl import Out, Params, Stage, hookimpl
from llmctl.launch.heartbeats import Heartbeat

class Nothing(Params):
    seconds: float = 0.0

def run(ctx, params):
    heartbeat = Heartbeat(ctx.resume_dir)
    for step in range(1, 5):
        heartbeat.enter("data", step)
        time.sleep(params.seconds if step == 3 else 0.1)
        heartbeat.enter("gradients", step)
    heartbeat.close()

@hookimpl
def register_stages():
    return [Stage(name="hangs", help="Hang.", params="hanging:Nothing", run="hanging:run")]
"""


@pytest.mark.slow
def test_the_runner_says_so(install, llmctl, tmp_path):
    install("hanging", {"hanging": "hanging"}, {"hanging.py": HANGS})
    (tmp_path / "work").mkdir(exist_ok=True)
    spec = tmp_path / "work" / "p.yaml"
    spec.write_text("llmctl: 1\nname: p\nstages:\n  h: {uses: hangs, with: {seconds: 5.5}}\n  q: {uses: hangs}\n")
    done = llmctl("run", "p.yaml", env={AFTER: "2"})
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "hangs: for" in line and line.startswith("warning: ")][:1]
    assert said.startswith("warning: h: rank 0 on ") and "in `data` of step 3" in said
    assert "q: rank" not in done.stderr


def test_what_runs_is_listed(llmctl, tmp_path):
    assert llmctl("ps").stdout == "no training runs in this store\n"
    store = Store.open(tmp_path / "work" / ".llmctl" / "store")
    store.create()
    mine = Heartbeat(store.work("sha256:" + 64 * "a"), 1, stage="train")
    mine.enter("gradients", 12)
    done = llmctl("ps", "--format", "json")
    (row,) = json.loads(done.stdout)
    assert (row["stage"], row["rank"], row["step"], row["phase"]) == ("train", 1, 12, "gradients")
    assert not row["hangs"]
    mine.close()
    assert llmctl("ps").stdout == "no training runs in this store\n"
