"""`retries`: which failures begin again, what the next attempt finds, and where the number of attempts is seen."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llmctl.errors import StageError, UsageError
from llmctl.pipeline.summary import summary
from llmctl.store import Store


@pytest.fixture
def flaky(run, work):
    """`flaky(how, retries)` → the result of the stage `w`, which succeeds at its third attempt."""

    def go(how, retries, good=3):
        path = work / "attempts"
        path.unlink(missing_ok=True)

        def change(pipeline):
            stages = {id: dataclasses.replace(stage, retries=retries) for id, stage in pipeline.stages.items()}
            return dataclasses.replace(pipeline, stages=stages)

        result = run(f"w: {{uses: flaky, with: {{path: {path}, how: {how}, good: {good}}}}}", change=change)
        return result, len(path.read_text())

    return go


def test_an_attempt_that_succeeds_ends_the_retries(flaky, events):
    result, times = flaky("raise", 5)
    assert (result.code, times) == (0, 3)
    stage = result.stages["w"]
    assert stage.attempts == 3
    started = [event["attempt"] for event in events() if event["type"] == "stage.start"]
    assert started == [1, 2, 3]
    assert sum(event["type"] == "stage.end" for event in events()) == 1
    warnings = [event["text"] for event in events() if event["type"] == "warning"]
    assert warnings == [f"attempt {n} of 6 failed with exit 1: ValueError: not yet; trying again" for n in (1, 2)]
    assert "3 attempts" in summary(result)
    assert json.loads((result.directory / "run.json").read_text())["stages"]["w"]["attempts"] == 3
    assert Store.open().manifest(stage.outputs["result"].id).provenance["attempts"] == 3
    log = (result.directory / "logs/w.log").read_text()
    assert "--- attempt 3 of 6 ---" in log
    # Each attempt goes on where the one before was.
    assert "attempt 1 finds nothing" in log
    assert "attempt 3 finds what 2 left" in log


@pytest.mark.parametrize(
    ("how", "code", "times"),
    [("raise", 1, 2), ("stage", 3, 2), ("kill", 3, 2), ("usage", 2, 1), ("gate", 4, 1), ("input", 5, 1),
     ("machine", 7, 1), ("stopped", 75, 1)],
)  # fmt: skip
def test_only_failures_that_may_pass_are_retried(how, code, times, flaky, events):
    result, made = flaky(how, 1)
    assert (result.code, made) == (code, times)
    assert result.stages["w"].attempts == times
    assert result.stages["w"].status == ("stopped" if code == 75 else "failed")
    (end,) = [event for event in events() if event["type"] == "stage.end"]
    assert (end["code"], end["stopped"]) == (code, code == 75)


def test_without_retries_there_is_one_attempt(flaky):
    result, times = flaky("stage", 0)
    assert (result.code, times) == (3, 1)


def test_exit_2_means_that_nothing_was_made(run, tmp_path):
    """A stage that refuses its parameters when others were made before is a failure like any other."""
    stages = f"a: {{uses: make}}\nw: {{uses: flaky, needs: [a], with: {{path: {tmp_path / 'n'}, how: usage, good: 9}}}}"
    first = run(stages)
    assert (first.code, first.stages["w"].code, type(first.error())) == (3, 2, StageError)
    assert (run(None).code, type(run(None).error())) == (2, UsageError)  # `a` was there already
