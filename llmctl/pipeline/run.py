"""Run a pipeline: cached stages are taken, others executed, gates checked, every step told as an event."""

from __future__ import annotations

import json
import secrets as tokens
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from llmctl.errors import InputError
from llmctl.launch.signals import Stop
from llmctl.launch.stopping import GRACE
from llmctl.pipeline import forecasts, machine
from llmctl.pipeline.events import Emit, EventLog
from llmctl.pipeline.execution import Options
from llmctl.pipeline.exports import export_targets
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.keyring import Keyring
from llmctl.pipeline.plan import Decision, Planner
from llmctl.pipeline.result import RunResult
from llmctl.pipeline.runner import Runner
from llmctl.pipeline.selection import Selection, select
from llmctl.registry import get_registry
from llmctl.spec.resolved import Pipeline, StageSpec
from llmctl.store import Store, names
from llmctl.store.commit import replace_json
from llmctl.store.copying import check_target

OnBusy = Literal["wait", "fail", "run"]
GateMode = Literal["stop", "warn"]


def run_pipeline(
    pipeline: Pipeline,
    store: Store,
    *,
    to: Sequence[str] = (),
    until: str | None = None,
    start: str | None = None,
    jobs: int = 1,
    keep_going: bool = False,
    on_busy: OnBusy = "wait",
    gates: GateMode = "stop",
    refresh: bool = False,
    strict: bool = False,
    grace: float = GRACE,
    emit: Emit | None = None,
    stop: Stop | None = None,
    tick: Callable[[], None] | None = None,
) -> RunResult:
    """Run the selected stages and return what became of each; never raises for a stage that failed.

    `to`, `until` and `start` select as `selection.select` says. Up to `jobs` stages run at once, as far as the machine
    has what they ask for. After a failed stage nothing new is started, with `keep_going` all that does not depend on
    it. `refresh` makes everything anew, `strict` puts the machine into every key. Between a request
    to stop and SIGKILL a stage has `grace` seconds. `emit` gets every event, from any
    thread but one at a time, and may return a text to warn of; `tick` is called about four times a second.
    Raises before anything runs: InputError (an input is missing, damaged or of a wrong kind, or a result before `start`
    is not there), UsageError (no such stage), MachineError (more resources asked for than there are, a training
    that cannot fit, a secret is not there), StageError (disk full).
    """
    chosen = select(pipeline, to, until, start)
    specs = chosen.specs
    inputs = Inputs(pipeline, store)
    inputs.check_paths(specs)
    machine.check_resources([spec for spec in specs if spec.id not in chosen.given], store.root)
    for target in (target for spec in specs for target in export_targets(spec).values()):
        check_target(target)
    store.create()
    inputs.check(specs)
    planner = Planner(pipeline, store, get_registry(), refresh=refresh, given=chosen.given, strict=strict)
    decisions = planner.plan(specs, inputs)
    check_given(chosen, decisions)
    forecasts.refuse(forecasts.outlooks(pipeline, specs, decisions, planner, inputs))
    keyring = Keyring(pipeline.secrets)
    keyring.look_up(spec for spec, decision in zip(specs, decisions, strict=True) if decision.works)
    if any(decision.works for decision in decisions):
        store.sweep()  # what a killed run has left may be what fills the disk
        machine.check_space(store.root)
    run = f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}-{tokens.token_hex(2)}"
    options = Options(on_busy=on_busy, gates=gates, jobs=jobs, keep_going=keep_going, grace=grace, stop=stop, tick=tick)
    events = EventLog(run, store.run(run), emit, keyring.masker())
    begun = time.monotonic()
    try:
        _open(pipeline, store, specs, events, decisions)
        keyring.guard(events)
        replace_json(store, store.run(run) / "spec.json", events.masker.plain(describe(pipeline, specs)))
        runner = Runner(pipeline, specs, store, planner, inputs, events, options, keyring, decisions)
        result = runner()
        result.seconds = time.monotonic() - begun
        _close(pipeline, store, events, result)
        return result
    finally:
        events.close()
        store.sweep()


def check_given(chosen: Selection, decisions: Sequence[Decision]) -> None:
    """InputError for the first stage before `--from` that has no result to start from."""
    for decision in decisions:
        if decision.id in chosen.given and decision.works:
            raise InputError(
                f"`{decision.id}` comes before `{chosen.start}` and has no result: {decision.why[0]}",
                hint=f"run it first with --to {decision.id}, or leave out --from",
            )


def _open(
    pipeline: Pipeline, store: Store, specs: Sequence[StageSpec], events: EventLog, decisions: Sequence[Decision]
) -> None:
    """Say what is to come."""
    file, directory = str(pipeline.file) if pipeline.file else None, store.run(events.run)
    events("run.start", pipeline=pipeline.name, file=file, directory=str(directory))
    events("plan", stages=[{"stage": d.id, "action": d.action, "why": list(d.why)} for d in decisions])


def _close(pipeline: Pipeline, store: Store, events: EventLog, result: RunResult) -> None:
    summary = {
        "id": result.run,
        "pipeline": pipeline.name,
        "file": str(pipeline.file) if pipeline.file else None,
        "code": result.code,
        "message": result.message,
        "seconds": round(result.seconds, 3),
        "ended": names.timestamp(),
        "stages": {id: stage.summary() for id, stage in result.stages.items()},
    }
    replace_json(store, result.directory / "run.json", events.masker.plain(summary))
    events("run.end", code=result.code, seconds=round(result.seconds, 3), message=result.message)


def describe(pipeline: Pipeline, specs: Sequence[StageSpec]) -> dict[str, Any]:
    """The resolved spec of a run as plain JSON, for the run's directory."""
    stages = {
        spec.id: {
            "uses": spec.stage.name,
            "inputs": {port: [str(ref) for ref in refs] for port, refs in spec.inputs.items()},
            "with": json.loads(spec.params.model_dump_json()),
            "needs": list(spec.needs),
            "gates": [asdict(gate) for gate in spec.gates],
            **({"matrix": dict(spec.row)} if spec.row else {}),
            **({"select": asdict(spec.select)} if spec.select else {}),
        }
        for spec in specs
    }
    sources = {name: {"uri": source.uri, "type": source.type} for name, source in pipeline.sources.items()}
    return {"name": pipeline.name, "profiles": list(pipeline.profiles), "sources": sources, "stages": stages}
