"""Secrets at run time: given to their stage only, masked everywhere, refused in outputs, not asked for without need."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from llmctl.console import open_reporter
from llmctl.errors import MachineError
from llmctl.pipeline.report import write_report
from llmctl.pipeline.summary import summary
from llmctl.registry import discover
from llmctl.spec.pipeline import load_pipeline
from llmctl.spec.resolved import EnvValue, Secret
from llmctl.store import Store

CANARY = "canary-7f3a9b"
PLAIN = "canary-in-the-open"
"""The control: declared in the spec as an ordinary value."""


def given(pipeline, stage="w", **values):
    """The pipeline with a secret that the stage gets as TOKEN, as the loader resolves `{secret: CANARY}`."""
    spec = pipeline.stages[stage]
    env = {"TOKEN": EnvValue(secret="CANARY", affects_output=False), **spec.env}
    secrets = {"CANARY": Secret(name="CANARY", origin="env", variable="HF_CANARY", where="p.yaml:3:3")}
    stages = {**pipeline.stages, stage: dataclasses.replace(spec, env=env, **values)}
    return dataclasses.replace(pipeline, stages=stages, secrets=secrets)


@pytest.fixture
def leak(run, monkeypatch, capfd):
    """`leak(where)` → (result, all that was printed); the stage does with its secret what `where` says."""
    monkeypatch.setenv("HF_CANARY", CANARY)

    def go(where, change=given, **fields):
        reporter = open_reporter()
        stages = f"w: {{uses: leak, with: {{where: {where}}}}}"
        with reporter:
            result = run(stages, change=lambda p: change(p, **fields), emit=reporter.event)
        return result, summary(result) + "".join(capfd.readouterr())

    return go


def holding(text, *roots):
    """Files below `roots` that hold a text, or are called so."""
    paths = [path for root in roots for path in root.rglob("*")]
    return [path for path in paths if text in path.name or (path.is_file() and text.encode() in path.read_bytes())]


def test_nothing_shows_a_secret(leak, work, events):
    result, printed = leak("everywhere")
    assert result.code == 0
    store = work / ".llmctl/store"
    assert holding(CANARY, work) == []
    assert CANARY not in printed
    log = (result.directory / "logs/w.log").read_text()
    for line in ("printed ***", "in *** pieces", '{"token": "***"}', "log: logged ***", "warning: warned ***"):
        assert line in log
    assert "***" in {event.get("name") for event in events()}
    assert Store.open().manifest(result.stages["w"].outputs["result"].id).metadata["about"] == "***"
    # The control: the same value as an ordinary one is found in all these places.
    store.rename(work / "first")

    def plain(pipeline):
        spec = pipeline.stages["w"]
        return dataclasses.replace(
            pipeline, stages={"w": dataclasses.replace(spec, env={"TOKEN": EnvValue(value=PLAIN)})}
        )

    result, printed = leak("everywhere", change=plain)
    found = {path.relative_to(store).parts[0] for path in holding(PLAIN, store)}
    assert found == {"runs", "keys", "requests", "artifacts"}
    names = {path.name for path in holding(PLAIN, result.directory)}
    assert names >= {"w.log", "events.jsonl", "metrics.jsonl", "run.json"}


@pytest.mark.parametrize("where", ["raise", "stage"])
def test_failures_and_tracebacks(where, leak, work):
    result, printed = leak(where)
    assert result.code in (1, 3)
    assert "***" in result.message
    assert CANARY not in printed + result.message + result.hint
    write_report(load_pipeline("p.yaml", registry=discover()), result)
    assert holding(CANARY, work) == []
    assert "***" in (result.directory / "logs/w.log").read_text()


@pytest.mark.parametrize(
    ("where", "file"), [("file", "config.json"), ("compressed", "rows.jsonl.gz"), ("name", "***.txt")]
)
def test_an_output_that_holds_a_secret_is_refused(where, file, leak, work):
    result, _ = leak(where)
    assert result.code == 3
    assert result.message == f"`w`: output `result` holds the secret in TOKEN: {file}"
    assert "nothing was committed; keep the value of TOKEN out" in result.hint
    assert holding(CANARY, work) == []
    assert not list((work / ".llmctl/store").glob("artifacts/*/*/*"))


def test_only_its_own_stage_gets_a_secret(run, monkeypatch):
    """The variable that it comes from would reach every stage by its prefix HF_."""
    monkeypatch.setenv("HF_CANARY", CANARY)
    monkeypatch.setenv("HF_OTHER", "x")
    stages = "w: {uses: leak, with: {where: nothing}}\ne: {uses: wrong, with: {how: env}}"
    result = run(stages, change=given)
    assert result.code == 0
    seen = json.loads((result.stages["e"].outputs["result"] / "env.json").read_text())
    assert CANARY not in seen.values()
    assert "HF_CANARY" not in seen and seen["HF_OTHER"] == "x"
    assert run(change=lambda p: given(given(p), stage="e"), refresh=True).code == 3  # `e` would write it down


def test_a_variable_stays_hidden_where_the_users_configuration_has_a_command_for_its_secret(run, monkeypatch):
    def by_command(pipeline):
        other = Secret(name="HF_CANARY", origin="command", command=f"echo {CANARY}", variable="HF_OTHER")
        return dataclasses.replace(
            given(pipeline), secrets={"CANARY": dataclasses.replace(other, name="CANARY"), "HF_CANARY": other}
        )

    monkeypatch.setenv("HF_CANARY", "old-canary")
    monkeypatch.setenv("HF_OTHER", "older-canary")
    stages = "w: {uses: leak, with: {where: nothing}}\ne: {uses: wrong, with: {how: env}}"
    result = run(stages, change=by_command)
    assert result.code == 0
    seen = json.loads((result.stages["e"].outputs["result"] / "env.json").read_text())
    assert not {"HF_CANARY", "HF_OTHER"} & seen.keys()


@pytest.mark.parametrize("there", [True, False])
def test_a_stage_that_was_cached_in_the_plan_may_need_its_secret_after_all(there, run, work, monkeypatch, events):
    """Its artifact goes between the plan and its turn."""
    monkeypatch.setenv("HF_CANARY", CANARY)
    first = run("w: {uses: leak, with: {where: everywhere}}", change=given)

    def lose(event):
        if event["type"] == "plan":
            assert event["stages"][0]["action"] == "cached"
            shutil.rmtree(first.stages["w"].outputs["result"].path)
            if not there:
                monkeypatch.delenv("HF_CANARY")

    result = run(change=given, emit=lose)
    if there:
        assert result.code == 0 and result.stages["w"].status == "done"
        assert "logged ***" in {event.get("text") for event in events()}
        assert holding(CANARY, work) == []
    else:
        assert result.code == 7
        assert "`w`: the secret `CANARY` (p.yaml:3:3) is not there" in result.message
        assert [event["code"] for event in events() if event["type"] == "stage.end"] == [7]


def test_a_secret_is_in_no_key(run, monkeypatch, actions):
    stages = "w: {uses: leak, with: {where: nothing}}"
    for value, action in ((CANARY, "run"), ("another-value", "cached")):
        monkeypatch.setenv("HF_CANARY", value)
        assert run(stages, change=given).code == 0
        assert actions() == {"w": action}
    monkeypatch.delenv("HF_CANARY")
    assert run(stages, change=given).code == 0  # what is done needs no secret
    with pytest.raises(MachineError) as error:
        run(stages, change=given, refresh=True)
    assert error.value.message == "the secret `CANARY` (p.yaml:3:3) is not there: the variable HF_CANARY is not set"
    assert error.value.hint == "export HF_CANARY=…"
    assert error.value.exit_code == 7


def test_a_short_secret_is_warned_of(run, monkeypatch, events):
    monkeypatch.setenv("HF_CANARY", "abc")
    assert run("w: {uses: leak, with: {where: everywhere}}", change=given).code == 0
    (warning, _) = [event["text"] for event in events() if event["type"] == "warning"]
    assert warning == "the secret `CANARY` has fewer than 6 characters: it is not masked in logs"
