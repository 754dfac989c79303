"""Every type of event has the fields that `docs/runs.md` lists, in files, copies and descriptors alike."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/runs.md"
ALWAYS = {"ts", "seq", "run", "type"}
NAME = re.compile(r"`([\w.]+)`")
RUN = """
a: {uses: make}
s: {uses: score, inputs: {text: a}, gates: [{metric: score, min: 2, on_fail: warn}]}
c: {uses: count, inputs: {text: a}, with: {max_steps: 2}}
u: {uses: upper, inputs: {text: a}, with: {sleep: 0.05}}
w: {uses: wrong, needs: [c, s, u]}
x: {uses: count, needs: [w]}
"""


@pytest.fixture
def documented():
    """Type → (fields that are always there, fields that may be), from the table of the page."""
    table = PAGE.read_text().partition("| `type` | Fields |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("| `")]
    found = {}
    for row in rows:
        kind, always, *rest = row
        # The parts of `plan`'s list are not fields of the event.
        names = NAME.findall(always.partition(":")[0])
        found[NAME.findall(kind)[0]] = (set(names), set(NAME.findall("".join(rest))), "own" in "".join(rest))
    return found


def check(events, documented):
    for event in events:
        always, sometimes, open_ = documented[event["type"]]
        fields = set(event) - ALWAYS
        assert set(event) >= ALWAYS
        assert always <= fields, event
        assert open_ or fields <= always | sometimes, event


def test_every_event_has_its_fields(run, events, documented):
    assert run(RUN).code == 1
    first = events()
    assert run(None, "c.max_steps=4", to=["c"]).code == 0
    found = [*first, *events()]
    check(found, documented)
    seen = {event["type"] for event in found}
    assert seen == set(documented) - {"stage.checkpoint"}  # `count` writes one only when it is stopped
    assert [event["seq"] for event in first] == list(range(len(first)))
    with pytest.raises(AssertionError):  # the control: a field that the page does not know
        check([{**first[0], "colour": "red"}], documented)


def test_checkpoints_and_choices_are_documented(documented):
    assert documented["stage.checkpoint"][0] == {"stage", "step"}
    assert {"metrics", "choice", "message", "stopped"} <= documented["stage.end"][1]


def test_a_descriptor_and_a_variable(fake_stages, llmctl_env, llmctl, spec, work):
    spec("a: {uses: make}")
    read, write = os.pipe()
    done = llmctl("run", "p.yaml", env={"LLMCTL_EVENTS": f"fd:{write}"}, pass_fds=(write,))
    os.close(write)
    assert done.returncode == 0, done.stderr
    with os.fdopen(read) as file:
        copied = [json.loads(line) for line in file]
    (log,) = (work / ".llmctl/store/runs").glob("*/events.jsonl")
    assert copied == [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("target", ["", "/dev/full"])
def test_a_copy_that_cannot_be_written_stops_no_run(target, llmctl, fake_stages, spec, events):
    """Its reader has gone, or its disk is full: the run says so once and goes on."""
    read, write = os.pipe()
    os.close(read)
    target = target or f"fd:{write}"
    done = llmctl("run", spec("a: {uses: make}"), "--events", target, pass_fds=(write,))
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"warning: events are no longer written to `{target}`: ") == 1
    assert [event["seq"] for event in events()] == list(range(len(events())))
    assert [event["type"] for event in events()][:2] == ["run.start", "warning"]
