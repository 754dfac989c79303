"""Run a pipeline: cached stages are taken, others executed in order, gates checked, every step told as an event."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from llmctl.errors import GateError
from llmctl.launch.failures import FULL, no_space
from llmctl.launch.signals import Stop
from llmctl.pipeline import machine
from llmctl.pipeline.durations import Durations, RunProgress
from llmctl.pipeline.events import Event, EventLog
from llmctl.pipeline.execution import Executor, Options
from llmctl.pipeline.exports import export, export_targets
from llmctl.pipeline.gates import check_gates, read_metrics
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.plan import Decision, Planner
from llmctl.pipeline.result import RunResult, StageResult
from llmctl.pipeline.selection import select
from llmctl.registry import get_registry
from llmctl.spec.resolved import Pipeline, StageRef, StageSpec
from llmctl.stage import Artifact
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
    on_busy: OnBusy = "wait",
    gates: GateMode = "stop",
    refresh: bool = False,
    emit: Callable[[Event], None] | None = None,
    stop: Stop | None = None,
    tick: Callable[[], None] | None = None,
) -> RunResult:
    """Run the selected stages and return what became of each; never raises for a stage that failed.

    `to` selects those stages and what they need, effects included; without it all stages but effects run, up to and
    without the dependants of `until`. `tick` is called about four times a second while a stage runs.
    Raises before anything runs: InputError (an input is missing, damaged or of a wrong kind), UsageError (no such
    stage), MachineError (more resources asked for than there are), StageError (disk full).
    """
    specs = select(pipeline, to, until)
    inputs = Inputs(pipeline, store)
    inputs.check_paths(specs)
    machine.check_resources(specs)
    for target in (target for spec in specs for target in export_targets(spec).values()):
        check_target(target)
    store.create()
    inputs.check(specs)
    planner = Planner(pipeline, store, get_registry(), refresh=refresh)
    decisions = planner.plan(specs, inputs)
    if any(decision.action != "cached" for decision in decisions):
        store.sweep()  # what a killed run has left may be what fills the disk
        machine.check_space(store.root)
    run = f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}-{secrets.token_hex(2)}"
    events = EventLog(run, store.run(run), emit)
    options = Options(on_busy=on_busy, gates=gates, stop=stop, tick=tick)
    try:
        return Runner(pipeline, specs, store, planner, inputs, events, options, decisions)()
    finally:
        events.close()
        store.sweep()


class Runner:
    """One run: walks the stages in order and keeps what became of each."""

    def __init__(
        self,
        pipeline: Pipeline,
        specs: Sequence[StageSpec],
        store: Store,
        planner: Planner,
        inputs: Inputs,
        events: EventLog,
        options: Options,
        decisions: Sequence[Decision],
    ) -> None:
        self.pipeline = pipeline
        self.specs = specs
        self.store = store
        self.planner = planner
        self.inputs = inputs
        self.events = events
        self.decisions = decisions
        self.options = options
        self.executor = Executor(pipeline, store, planner, inputs, events, options, self.progressed)
        self.directory = store.run(events.run)
        self.durations = Durations(store, pipeline)
        cached = {decision.id for decision in decisions if decision.action == "cached"}
        self.progress = RunProgress(specs, cached, self.durations)
        self._said = 0.0
        self.results: dict[str, StageResult] = {}
        self.outputs: dict[str, Mapping[str, Artifact]] = {}
        self.blocked: dict[str, str] = {}
        """Why the dependants of a stage cannot run: `failed`, `gate`, `stopped` or `skipped`."""

    def __call__(self) -> RunResult:
        """Run everything that can run."""
        begun = time.monotonic()
        self._open()
        for spec in self.specs:
            stage = self._stage(spec)
            self.results[spec.id] = stage
            self.progress.end(spec.id, stage.seconds if stage.status != "cached" else 0.0)
            self.events("run.progress", **self.progress.fields())
        code, message, hint = self._verdict()
        result = RunResult(
            run=self.events.run,
            directory=self.directory,
            code=code,
            stages=self.results,
            seconds=time.monotonic() - begun,
            message=message,
            hint=hint,
        )
        self._close(result)
        return result

    def progressed(self, event: Mapping[str, Any]) -> None:
        """A running stage says how far it is; the whole run's progress follows at most once a second."""
        self.progress.step(event)
        now = time.monotonic()
        if now - self._said >= 1.0:
            self._said = now
            self.events("run.progress", **self.progress.fields())

    # -- one stage ----------------------------------------------------------------------------------------------------

    def _stage(self, spec: StageSpec) -> StageResult:
        """Take, make or skip one stage, then its gates, names and copies."""
        if reason := self._skip_reason(spec):
            self.events("stage.skipped", stage=spec.id, reason=reason)
            return StageResult(id=spec.id, status="skipped", message=reason)
        bound = self.inputs.bind(spec, self.outputs)
        if bound is None:
            raise RuntimeError(f"the inputs of `{spec.id}` are not there although all it depends on is done")
        decision = self.planner.decide(spec, bound)
        if decision.pointer is None:
            self.progress.start(spec.id)
            result = self.executor.run(spec, bound, decision)
            if result.status == "done":
                self.durations.remember(spec, result.seconds)
        else:
            result = self.executor.cached(spec, decision.pointer)
        if not result.ok:
            self.blocked[spec.id] = result.status
            return result
        self.outputs[spec.id] = result.outputs
        return self._settle(spec, result)

    def _settle(self, spec: StageSpec, result: StageResult) -> StageResult:
        """Check the gates of a finished stage; name and copy its result only if none of them stops."""
        result.metrics = read_metrics(result.outputs, result.metrics)
        result.headline = {name: result.metrics[name] for name in spec.stage.headline if name in result.metrics}
        result.gates = check_gates(spec, result.metrics, self._baseline, warn=self.options.gates == "warn")
        for gate in result.gates:
            fields = asdict(gate)
            self.events("gate", **fields)
            if not gate.ok and gate.on_fail == "warn":
                self.events("warning", stage=spec.id, text=f"gate missed: {gate.message}")
        ids = {port: (artifact.id, artifact.type) for port, artifact in result.outputs.items()}
        stopped = any(not gate.ok and gate.on_fail == "stop" for gate in result.gates)
        tag = "" if stopped else spec.tag
        names.write(self.store, self.pipeline.name, spec.id, ids, key=result.key, run=self.events.run, tag=tag)
        if stopped:
            self.blocked[spec.id] = "gate"
            return result
        for port, target in export_targets(spec).items():
            try:
                if export(result.outputs[port], target):
                    self.events("log", stage=spec.id, text=f"copied {port} to {target}")
            except OSError as error:
                failure = no_space(target) if error.errno in FULL else None
                result.status, result.code = "failed", 3
                result.message = failure.message if failure else f"cannot copy {port} to {target}: {error}"
                result.hint = failure.hint if failure else "the result is in the store: llmctl get"
                self.blocked[spec.id] = "failed"
        return result

    def _baseline(self, ref: StageRef) -> Mapping[str, Any]:
        artifact = self.outputs[ref.stage][ref.port]
        return read_metrics({ref.port: artifact})

    def _skip_reason(self, spec: StageSpec) -> str:
        """Why a stage cannot run, empty if it can."""
        if self.options.stopping:
            return "the run was stopped"
        for id in spec.dependencies:
            if id in self.blocked:
                how = self.blocked[id]
                self.blocked[spec.id] = "skipped"
                return f"a gate of `{id}` failed" if how == "gate" else f"`{id}` {_was(how)}"
        if "stopped" in self.blocked.values():
            return "the run was stopped"
        return ""

    # -- the whole run ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Say what is to come, and write down what was asked for."""
        file = str(self.pipeline.file) if self.pipeline.file else None
        self.events("run.start", pipeline=self.pipeline.name, file=file, directory=str(self.directory))
        rows = [{"stage": d.id, "action": d.action, "why": list(d.why)} for d in self.decisions]
        self.events("plan", stages=rows)
        self.events("run.progress", **self.progress.fields())
        replace_json(self.store, self.directory / "spec.json", describe(self.pipeline, self.specs))

    def _verdict(self) -> tuple[int, str, str]:
        """Exit code, line and hint: a signal before a failure, a failure before a gate."""
        stop = self.options.stop
        if stop is not None and stop.requests and any(not result.ok for result in self.results.values()):
            return stop.code, "stopped; finished stages are kept", "run the same command again to continue"
        for result in self.results.values():
            if result.code:
                where = f"log: {result.log}" if result.log else ""
                hint = "; ".join(part for part in (result.hint, where) if part)
                return result.code, f"`{result.id}`: {result.message}", hint
        missed = [g for r in self.results.values() for g in r.gates if not g.ok and g.on_fail == "stop"]
        if missed:
            more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
            hint = f"numbers: llmctl show {self.pipeline.name}/{missed[0].stage}; `--gates warn` goes on anyway"
            return GateError.exit_code, f"gate failed: {missed[0].message}{more}", hint
        return 0, "", ""

    def _close(self, result: RunResult) -> None:
        summary = {
            "id": result.run,
            "pipeline": self.pipeline.name,
            "file": str(self.pipeline.file) if self.pipeline.file else None,
            "code": result.code,
            "message": result.message,
            "seconds": round(result.seconds, 3),
            "ended": names.timestamp(),
            "stages": {id: stage.summary() for id, stage in result.stages.items()},
        }
        replace_json(self.store, self.directory / "run.json", summary)
        self.events("run.end", code=result.code, seconds=round(result.seconds, 3), message=result.message)


def describe(pipeline: Pipeline, specs: Sequence[StageSpec]) -> dict[str, Any]:
    """The resolved spec of a run as plain JSON, for the run's directory."""
    stages = {
        spec.id: {
            "uses": spec.stage.name,
            "inputs": {port: [str(ref) for ref in refs] for port, refs in spec.inputs.items()},
            "with": json.loads(spec.params.model_dump_json()),
            "needs": list(spec.needs),
            "gates": [asdict(gate) for gate in spec.gates],
        }
        for spec in specs
    }
    sources = {name: {"uri": source.uri, "type": source.type} for name, source in pipeline.sources.items()}
    return {"name": pipeline.name, "profiles": list(pipeline.profiles), "sources": sources, "stages": stages}


def _was(status: str) -> str:
    return {"failed": "failed", "stopped": "was stopped", "skipped": "was skipped"}[status]
