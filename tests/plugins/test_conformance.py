"""llmctl's own stages against the contract of every stage, as `llmctl plugins test llmctl` has it."""

from pathlib import Path

import pytest

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
    "name", ["tokenize", *(pytest.param(n, marks=pytest.mark.slow) for n in ("data", "rag", "eval"))]
)
def test_cheap_stages_conform(name, check, tmp_path):
    if name in ("rag", "eval"):
        pytest.importorskip("torch")
    (outcome,) = check_stage(built_in()[name], directory=tmp_path, only=[check], file=FILE)
    keeps_nothing = name in ("data", "tokenize", "rag")  # such a stage begins anew after a stop
    assert outcome.status == ("not applicable" if check.name == "resume" and keeps_nothing else "ok")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "tokenize", "rag", "eval"])
def test_cheap_stages_survive_kill_9(name, tmp_path):
    pytest.importorskip("torch")
    check_stage(built_in()[name], directory=tmp_path, only=[c for c in CHECKS if c.name == "kill"], file=FILE)
