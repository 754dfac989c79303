"""The context of one execution: what a stage reports is what gates and tables read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmctl import Context
from llmctl.stage import Stage


def context(tmp_path, events):
    emit = lambda kind, fields: events.append((kind, dict(fields)))  # noqa: E731
    return Context("s", {"metrics": tmp_path / "metrics"}, tmp_path / "resume", emit)


def test_reports_add_up_and_numpy_scalars_are_plain_numbers(tmp_path):
    events = []
    ctx = context(tmp_path, events)
    ctx.report({"loss": np.float32(0.5), "rows": np.int64(3)})
    ctx.report({"ok": np.bool_(True), "name": "x", "loss": 0.25})
    expected = {"loss": 0.25, "rows": 3, "ok": True, "name": "x"}
    assert json.loads((tmp_path / "metrics" / "metrics.json").read_text()) == expected == ctx.reported
    assert [type(fields["value"]) for kind, fields in events] == [float, int, bool, str, float]


def test_a_stopped_stage_says_whether_it_kept_anything(tmp_path):
    ctx = context(tmp_path, [])
    ctx.resume_dir.mkdir()
    (ctx.resume_dir / "STOP").touch()
    assert str(ctx.stopped(7)) == "`s` stopped at step 7 without a checkpoint, as it keeps none"
    (ctx.resume_dir / "state.json").touch()
    assert str(ctx.stopped(7)) == "`s` stopped at step 7 with a checkpoint"


@pytest.mark.parametrize("name", ["Sft", "sft_x", "1sft", "", "sft "])
def test_a_stage_name_is_a_command_name(name):
    with pytest.raises(ValueError, match="must match"):
        Stage(name=name, help="h", params="m:P", run="m:r")
