"""llmctl's own stages against the contract of every stage, as `llmctl plugins test llmctl` has it."""

import json
from pathlib import Path

import pytest

from llmctl import Artifact, Context, TempFail
from llmctl.registry import get_registry
from llmctl.testing.baseline import PluginFile, compare, describe
from llmctl.testing.conformance import CHECKS, check_stage

FILE = Path(__file__).parent / "llmctl-plugin.json"
RECORD = "llmctl plugins test llmctl --record --file tests/plugins/llmctl-plugin.json"


def built_in():
    return {stage.name: stage for p in get_registry().plugins if p.dist_name == "llmctl" for stage in p.stages}


def test_defaults_are_recorded_and_none_changed_without_a_higher_rev():
    recorded = PluginFile.read(FILE).recorded
    for name, stage in built_in().items():
        status, reason = compare(recorded.get(name), describe(stage))
        assert status == "ok", f"{name}: {reason}"
        assert recorded[name] == describe(stage), f"{name}: {reason or RECORD}"
    assert set(recorded) == set(built_in())


def test_a_changed_default_of_a_built_in_stage_is_noticed():
    changed = describe(built_in()["sft"])
    assert compare(changed, describe(built_in()["sft"])) == ("ok", "")
    changed["parameters"]["lr"]["default"] = 1.0
    status, reason = compare(changed, describe(built_in()["sft"]))
    assert status == "failed"
    assert "the default of `lr` went from 1.0 to" in reason


@pytest.mark.parametrize("check", [check for check in CHECKS if check.name not in ("kill", "revision")], ids=str)
@pytest.mark.parametrize(
    "name", ["tokenize", *(pytest.param(n, marks=pytest.mark.slow) for n in ("data", "rag", "eval", "probe"))]
)
def test_cheap_stages_conform(name, check, tmp_path):
    if name in ("rag", "eval", "probe"):
        pytest.importorskip("torch")
    (outcome,) = check_stage(built_in()[name], directory=tmp_path, only=[check], file=FILE)
    # Such a stage begins anew after a stop; `data` keeps whole tasks, and the kit's corpus is one task.
    keeps_nothing = name in ("data", "rag", "probe")
    assert outcome.status == ("not applicable" if check.name == "resume" and keeps_nothing else "ok")


@pytest.mark.parametrize(("name", "params"), [("tokenize", {"vocab_size": 266})])
def test_stages_that_keep_nothing_end_where_they_report(name, params, tmp_path):
    """The launcher ends a stage that never asks by raising where it reports: nothing may hold that up on the way."""
    stage, path, said = built_in()[name], tmp_path / "in.jsonl", []
    path.write_text("".join(json.dumps({"text": f"text number {number}"}) + "\n" for number in range(350)))
    inputs = {port: Artifact(path, "dataset.text") if port == "text" else None for port in stage.inputs}

    def emit(kind, fields):
        said.append((kind, fields["step"]))
        raise TempFail("stopped")

    def ask():
        raise AssertionError("a stage that asks is not ended by the launcher: it must keep its work")

    context = Context(name, {port: tmp_path / port for port in stage.outputs}, tmp_path / "resume", emit, ask)
    with pytest.raises(TempFail, match="stopped"):
        stage.load_run()(context, stage.load_params().model_validate(params), **inputs)
    assert said == [("progress", 100)]
    assert not (tmp_path / "resume").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "tokenize", "rag", "eval"])
def test_cheap_stages_survive_kill_9(name, tmp_path):
    pytest.importorskip("torch")
    check_stage(built_in()[name], directory=tmp_path, only=[c for c in CHECKS if c.name == "kill"], file=FILE)
