"""`--from`, `--to`, `--until` with instances of a matrix; `select`; fan-in: pipelines are built by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmctl import In, Out, Stage
from llmctl.errors import InputError, UsageError
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.plan import Planner
from llmctl.pipeline.report import render
from llmctl.pipeline.run import run_pipeline
from llmctl.pipeline.selection import select
from llmctl.pipeline.summary import summary
from llmctl.registry import discover
from llmctl.spec.params import Params
from llmctl.spec.pipeline import load_pipeline
from llmctl.spec.resolved import Select, StageRef, StageSpec
from llmctl.store import Store
from llmctl.store.lineage import lineage

SCORES = {"0.2": 0.2, "0.9": 0.9, "0.90": 0.9}
"""Source text of a matrix value → number; two rows are equal."""

DONE: list[Path] = []
"""A store in which the pipeline has run, once for all tests."""

BASE = """
a: {uses: make}
u: {uses: upper, inputs: {text: a}}
s: {uses: score, inputs: {text: u}}
end: {uses: upper, inputs: {text: a}, with: {mark: "!"}}
go: {uses: send, inputs: {text: end}, with: {path: pushed}}
"""


class Nothing(Params):
    """The parameters of a node of the engine."""


@pytest.fixture
def sweep(run, spec, monkeypatch, tmp_path_factory):
    """`sweep(metric="score", mode="max")` → a pipeline as the loader makes it from a matrix, a foreach and a select."""
    registry = discover()
    monkeypatch.setattr("llmctl.pipeline.run.get_registry", lambda: registry)

    def build(metric="score", mode="max", ephemeral=False, names=None):
        spec(BASE)
        loaded = load_pipeline("p.yaml", registry=registry)
        stages = {"a": loaded.stages["a"]}
        rows = sorted(f"[score={text}]" for text in SCORES)
        for row in rows:
            text = row[7:-1]
            values = {"score": SCORES[text]}
            own = loaded.stages["u"].params.model_copy(update={"mark": text})
            stages[f"u{row}"] = dataclasses.replace(
                loaded.stages["u"], id=f"u{row}", base="u", row=values, params=own, ephemeral=ephemeral
            )
        for row in rows:
            own = loaded.stages["s"].params.model_copy(
                update={"score": SCORES[row[7:-1]], **(names or {}).get(row, {})}
            )
            inputs = {"text": (StageRef(stage=f"u{row}", port="text", type="dataset.text"),)}
            values = {"score": SCORES[row[7:-1]]}
            stages[f"s{row}"] = dataclasses.replace(
                loaded.stages["s"], id=f"s{row}", base="s", row=values, params=own, inputs=inputs
            )
        ports = {"text": "u", "metrics": "s"}
        types = {"text": "dataset.text", "metrics": "metrics"}
        node = Stage(
            name="select",
            help="Pick a row.",
            params="",
            run="",
            inputs={port: In(types[port], many=True) for port in ports},
            outputs={port: Out(types[port]) for port in ports},
        )
        stages["best"] = StageSpec(
            id="best",
            base="best",
            stage=node,
            params=Nothing(),
            inputs={
                port: tuple(StageRef(stage=f"{stage}{row}", port=port, type=types[port]) for row in rows)
                for port, stage in ports.items()
            },
            outputs=types,
            select=Select(metric=metric, mode=mode, port="metrics"),
        )
        inputs = {"text": (StageRef(stage="best", port="text", type="dataset.text"),)}
        stages["end"] = dataclasses.replace(loaded.stages["end"], inputs=inputs)
        stages["go"] = loaded.stages["go"]
        return dataclasses.replace(loaded, stages=stages)

    def go(pipeline, **options):
        return run_pipeline(pipeline, Store.open(), **options)

    def done():
        """The whole pipeline has run; of later tests, in a copy of the first one's store."""
        if DONE:
            shutil.copytree(DONE[0], Store.open().root)
            return
        assert go(build()).code == 0
        keep()

    def keep():
        """Keep this store for later tests."""
        if not DONE:
            DONE.append(tmp_path_factory.mktemp("done") / "store")
            shutil.copytree(Store.open().root, DONE[0])

    def plan(pipeline, **options):
        specs, inputs = select(pipeline, **options).specs, Inputs(pipeline, Store.open())
        return {d.id: d for d in Planner(pipeline, Store.open(), registry).plan(specs, inputs)}

    return SimpleNamespace(build=build, run=go, plan=plan, done=done, keep=keep)


ROWS = sorted(f"[score={text}]" for text in SCORES)


# -- select -----------------------------------------------------------------------------------------------------------


def test_the_best_row_wins_and_its_artifacts_are_the_outputs(sweep, events, work):
    pipeline, winner = sweep.build(), "u[score=0.90]"
    before = sweep.plan(pipeline)
    assert before["best"].action == "unknown"
    assert before["best"].why[0] == "needs the result of `u[score=0.2]`"
    result = sweep.run(pipeline)
    assert result.code == 0, result.message
    sweep.keep()
    best = result.stages["best"]
    assert best.outputs["text"] == result.stages[winner].outputs["text"]  # the same id at the same path
    assert best.outputs["metrics"] == result.stages[winner.replace("u", "s")].outputs["metrics"]
    assert best.choice.stage == winner  # of the equal rows 0.9 and 0.90 the first in order of ids
    assert best.choice.values == {"score": SCORES[winner[8:-1]]}
    assert not any(event["type"] == "stage.start" and event["stage"] == "best" for event in events())
    (end,) = [event for event in events() if event["type"] == "stage.end" and event["stage"] == "best"]
    assert end["choice"]["stage"] == winner
    ref = json.loads((work / ".llmctl/store/refs/p/best.text.json").read_text())
    assert ref["id"] == best.outputs["text"].id
    used = Store.open().manifest(result.stages["end"].outputs["text"].id).provenance["inputs"]["text"]
    assert used == [best.outputs["text"].id]
    nodes = lineage(Store.open(), Store.open().manifest(ref["id"]))
    assert nodes[ref["id"]].instance == winner
    assert f"chose {winner}" in summary(result)
    assert f"chose {winner}" in render(pipeline, result)
    kept = json.loads((result.directory / "run.json").read_text())["stages"]["best"]["choice"]
    assert (kept["stage"], kept["rows"], kept["value"]) == (winner, 3, SCORES[winner[8:-1]])

    # A fan-in follows the ids of the instances, in whatever order they ended.
    done = {id: stage.outputs for id, stage in reversed(result.stages.items())}
    bound = Inputs(pipeline, Store.open()).bind(pipeline.stages["best"], done)
    assert bound["text"] == [result.stages[f"u{row}"].outputs["text"] for row in ROWS]
    # The plan decides a choice whose inputs are known, so that what follows is known, too.
    after = sweep.plan(pipeline)
    assert {decision.action for id, decision in after.items() if id != "best"} == {"cached"}
    assert after["best"].why == ("u[score=0.90]: score 0.9 is the largest of 3",)
    again = sweep.run(pipeline)
    assert again.code == 0
    assert {stage.status for id, stage in again.stages.items() if id != "best"} == {"cached"}
    # Another choice has other dependants, without any row being made anew.
    other = sweep.plan(sweep.build(mode="min"))
    assert other["best"].choice.stage == "u[score=0.2]"
    assert other["end"].action == "run"
    assert other["u[score=0.2]"].action == "cached"


def test_a_row_without_the_metric_is_an_error_that_names_it(sweep, actions):
    sweep.done()
    pipeline = sweep.build(names={"[score=0.2]": {"name": "other"}})
    result = sweep.run(pipeline)
    assert result.code == 3
    assert result.message == "`best`: `s[score=0.2]` reports no number `score`; it has fine, other"
    assert actions()["end"] == "skipped"


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_order_of_completion_changes_nothing(sweep, monkeypatch, work):
    """Rows that end in another order: the same keys, choice, fan-in and order of the report."""
    found = []
    for seed, sleeps in enumerate(([1.2, 0.6, 0.0], [0.0, 0.6, 1.2])):
        slow = dict(zip((f"u{row}" for row in ROWS), sleeps, strict=True))
        pipeline = sweep.build()
        stages = {
            id: dataclasses.replace(stage, params=stage.params.model_copy(update={"sleep": slow[id]}))
            if id in slow
            else stage
            for id, stage in pipeline.stages.items()
        }
        monkeypatch.setenv("LLMCTL_STORE", str(work / f"store-{seed}"))
        monkeypatch.setattr("llmctl.pipeline.machine.cores", lambda: 4)
        result = sweep.run(dataclasses.replace(pipeline, stages=stages), jobs=3, to=["u"])
        assert result.code == 0
        lines = (result.directory / "events.jsonl").read_text().splitlines()
        ended = [e["stage"] for e in map(json.loads, lines) if e["type"] == "stage.end"]
        ids = {id: {p: a.id for p, a in s.outputs.items()} for id, s in result.stages.items()}
        found.append((ended, list(ids), ids, [s.key for s in result.stages.values()]))
    assert found[0][0] != found[1][0]  # the control: they did end in another order
    assert found[0][1:] == found[1][1:]


# -- --from, --to, --until --------------------------------------------------------------------------------------------


def test_a_stage_means_all_its_rows_and_a_row_itself(sweep):
    pipeline = sweep.build()

    def ids(**options):
        return [spec.id for spec in select(pipeline, **options).specs]

    assert ids(to=["u"]) == ["a", *(f"u{row}" for row in ROWS)]
    assert ids(to=["u[score=0.2]"]) == ["a", "u[score=0.2]"]
    assert ids(until="u[score=0.2]") == ["a", *(f"u{row}" for row in ROWS), *(
        f"s{row}" for row in ROWS if row != "[score=0.2]"
    )]  # fmt: skip
    assert ids(until="s") == ["a", *(f"u{row}" for row in ROWS), *(f"s{row}" for row in ROWS)]
    assert "go" not in ids()
    assert ids(start="go", to=["go"])[-1] == "go" == ids(until="go", to=["go"])[-1]
    assert "go" not in ids(start="end")
    assert select(pipeline, start="end").given == {"a", "best", *(f"{s}{row}" for row in ROWS for s in "us")}
    assert select(pipeline, start="s[score=0.2]", to=["best"]).given == {"a"} | {f"u{row}" for row in ROWS} | {
        f"s{row}" for row in ROWS if row != "[score=0.2]"
    }


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"to": ["u[score=0.22]"]}, "there is no stage `u[score=0.22]`", "did you mean `u[score=0.2]`?"),
        ({"start": "bets"}, "there is no stage `bets`", "did you mean `best`?"),
        ({"start": "end", "to": ["s"]}, "does not depend on `end`", "either --to or --from"),
        ({"start": "end", "until": "best"}, "`end` comes after `best`: nothing is left", "exchange"),
        ({"to": ["end"], "until": "u"}, "`end` comes after `u`", "either --to or --until"),
        ({"start": "go"}, "`go` acts on the world: --from does not run it", "--to go does"),
        ({"until": "go"}, "`go` acts on the world: --until does not run it", "--to go does"),
        ({"start": "go", "to": ["end"]}, "--from does not run it", "--to go does"),
        ({"start": ""}, "--from is empty", "or leave --from out"),  # an unset variable of the shell
        ({"until": ""}, "--until is empty", "or leave --until out"),
        ({"to": [""]}, "there is no stage ``", "its stages: a, u"),
    ],
)
def test_names_that_fit_nothing(options, message, hint, sweep):
    with pytest.raises(UsageError) as error:
        select(sweep.build(), **options)
    assert message in error.value.message
    assert hint in error.value.hint


def test_effects_and_what_needs_them_run_only_by_name(sweep):
    pipeline = sweep.build()
    go = pipeline.stages["go"]
    stages = {
        **pipeline.stages,
        "later": dataclasses.replace(pipeline.stages["end"], id="later", base="later", needs=("go",)),
    }
    pipeline = dataclasses.replace(pipeline, stages=stages)
    assert not {"go", "later"} & {spec.id for spec in select(pipeline).specs}
    assert {"go", "later"} <= {spec.id for spec in select(pipeline, ["later"]).specs}
    with pytest.raises(UsageError) as error:
        select(dataclasses.replace(pipeline, stages={"go": go}))
    assert (error.value.message, error.value.hint) == ("all stages of `p` act on the world", "name one: --to go")
    assert select(dataclasses.replace(pipeline, stages={"go": go}, single=True)).specs == (go,)


def test_from_needs_what_lies_before(sweep, actions):
    pipeline = sweep.build()
    with pytest.raises(InputError) as error:
        sweep.run(pipeline, start="end")
    assert error.value.message == "`a` comes before `end` and has no result: new"
    assert error.value.hint == "run it first with --to a, or leave out --from"
    shutil.rmtree(Store.open().root)
    sweep.done()
    assert sweep.run(pipeline, start="end").code == 0
    assert actions()["end"] == "cached"
    assert sweep.run(pipeline, start="end", refresh=True).code == 0
    assert {id for id, action in actions().items() if action == "run"} == {"end"}  # --cache refresh is about these only


# -- ephemeral --------------------------------------------------------------------------------------------------------


def test_ephemeral_rows_are_collected_but_for_the_winner(sweep, events):
    sweep.done()
    pipeline = sweep.build(ephemeral=True)
    result = sweep.run(pipeline)
    assert result.code == 0
    there = {id: "text" in stage.outputs for id, stage in result.stages.items() if id.startswith("u")}
    assert there == {f"u{row}": row == "[score=0.90]" for row in ROWS}
    assert result.stages["best"].outputs["text"].path.is_dir()
    assert len(list((Store.open().root / "trash").iterdir())) == 2
    decisions = sweep.plan(pipeline)
    assert {d.action for id, d in decisions.items() if id != "best"} == {"cached"}
    assert sorted(id for id, d in decisions.items() if d.collected) == sorted(
        f"u{row}" for row in ROWS if row != "[score=0.90]"
    )
    again = sweep.run(pipeline)
    assert again.code == 0
    assert not any(event["type"] == "stage.start" for event in events())
    # Another choice needs the bytes of another row: that one alone is made again.
    least = sweep.build(mode="min", ephemeral=True)
    assert sweep.run(least).code == 0
    assert {e["stage"] for e in events() if e["type"] == "stage.start"} == {"u[score=0.2]", "end"}
