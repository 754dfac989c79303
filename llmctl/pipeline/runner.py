"""The walk through a pipeline's stages: what is ready starts as soon as there is room, what is done is settled.

Each stage is watched by a thread of its own, which lives until the stage's process has ended. All else happens in the
thread that called: decisions, gates, names, exports. The order in which stages end changes no key and no report.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.errors import GateError, InputError, StageError, UsageError
from llmctl.pipeline.choice import choose
from llmctl.pipeline.durations import Durations, RunProgress
from llmctl.pipeline.ephemeral import Collector
from llmctl.pipeline.events import EventLog
from llmctl.pipeline.execution import Executor, Options
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.keyring import Keyring
from llmctl.pipeline.plan import Bound, Decision, Planner
from llmctl.pipeline.result import RunResult, StageResult
from llmctl.pipeline.settlement import Settlement
from llmctl.pipeline.slots import Grant, Slots
from llmctl.spec.resolved import Pipeline, StageSpec
from llmctl.store import Store

PAUSE = 0.25
"""Seconds between two calls of `tick`, and until a request to stop is seen."""
WAS = {"failed": "failed", "stopped": "was stopped", "skipped": "was skipped"}

Ended = tuple[StageSpec, Grant, StageResult | BaseException]


class Runner:
    """One run: starts and settles the stages and keeps what became of each."""

    def __init__(
        self,
        pipeline: Pipeline,
        specs: Sequence[StageSpec],
        store: Store,
        planner: Planner,
        inputs: Inputs,
        events: EventLog,
        options: Options,
        keyring: Keyring,
        decisions: Sequence[Decision],
    ) -> None:
        self.pipeline = pipeline
        self.specs = specs
        self.planner = planner
        self.inputs = inputs
        self.events = events
        self.options = options
        self.directory = store.run(events.run)
        self.durations = Durations(store, pipeline)
        idle = {decision.id for decision in decisions if not decision.works}
        idle |= {spec.id for spec in specs if spec.select is not None}
        self.progress = RunProgress(specs, idle, self.durations, options.jobs)
        self.executor = Executor(pipeline, store, planner, inputs, events, options, keyring, self.progressed)
        self.settlement = Settlement(pipeline, store, events, options.gates)
        self.collector = Collector(pipeline, store, specs)
        self.results: dict[str, StageResult] = {}
        self._dependencies = {spec.id: spec.dependencies for spec in specs}
        self._slots = Slots.of_machine(options.jobs)
        self._running: dict[str, threading.Thread] = {}
        self._work: dict[str, str] = {}
        """The resume key of each running stage."""
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._blocked: dict[str, str] = {}
        """Why the dependants of a stage cannot run: `failed`, `gate`, `stopped` or `skipped`."""
        self._decided: dict[str, tuple[Bound, Decision]] = {}
        """Stages that are ready but wait for room."""
        self._said = 0.0

    def __call__(self) -> RunResult:
        """Run everything that can run."""
        self._say_progress(now=True)
        waiting = list(self.specs)
        try:
            while waiting or self._running:
                # Settling a cached stage may make those before it in the list ready: look again until nothing moves.
                while self._look_through(waiting):
                    pass
                if self._running:
                    self._wait()
                elif waiting:
                    raise RuntimeError(f"there is no room for `{waiting[0].id}` although nothing runs")
        except BaseException:
            self.executor.abort()
            raise
        finally:
            for thread in self._running.values():
                thread.join()
        stages = {spec.id: self.results[spec.id] for spec in self.specs}
        code, message, hint = self._verdict(stages)
        return RunResult(
            run=self.events.run, directory=self.directory, code=code, stages=stages, message=message, hint=hint
        )

    def progressed(self, stage: str, event: Mapping[str, Any]) -> None:
        """A running stage says how far it is; the whole run's progress follows at most once a second."""
        self.progress.step(stage, event)
        self._say_progress()

    def _say_progress(self, *, now: bool = False) -> None:
        """How far the run is, at most once a second unless it matters `now`: it takes a look at every stage."""
        clock = time.monotonic()
        if now or clock - self._said >= 1.0:
            self._said = clock
            self.events("run.progress", **self.progress.fields())

    # -- starting -----------------------------------------------------------------------------------------------------

    def _look_through(self, waiting: list[StageSpec]) -> bool:
        """Skip, take or start every stage of `waiting` that can be, and take it out; whether anything was settled."""
        settled = False
        for spec in list(waiting):
            if not self._turn(spec):
                continue
            waiting.remove(spec)
            settled = settled or spec.id in self.results
        return settled and bool(waiting)

    def _turn(self, spec: StageSpec) -> bool:
        """Do what can be done with a stage now; False if it has to wait."""
        if reason := self._skip_reason(spec):
            self.events("stage.skipped", stage=spec.id, reason=reason)
            self._finish(spec, StageResult(id=spec.id, status="skipped", message=reason))
            return True
        if any(id not in self.results for id in self._dependencies[spec.id] if id in self._dependencies):
            return False
        bound, decision = self._decide(spec)
        if decision.choice is not None:
            self._finish(spec, self.executor.chosen(spec, decision.choice))
        elif decision.pointer is not None:
            self._finish(spec, self.executor.cached(spec, decision))
        elif failure := self._failure(spec, bound):
            self._finish(spec, failure)
        elif reason := self._ending():
            self.events("stage.skipped", stage=spec.id, reason=reason)
            self._finish(spec, StageResult(id=spec.id, status="skipped", message=reason))
        else:
            return self._start(spec, bound, decision)
        return True

    def _decide(self, spec: StageSpec) -> tuple[Bound, Decision]:
        """What to do with a stage whose dependencies are done; asked once, however long it waits for room."""
        if spec.id not in self._decided:
            bound = self.inputs.bind(spec, self.settlement.outputs)
            if bound is None:
                raise RuntimeError(f"the inputs of `{spec.id}` are not there although all it depends on is done")
            self._decided[spec.id] = bound, self.planner.decide(spec, bound)
        return self._decided[spec.id]

    def _failure(self, spec: StageSpec, bound: Bound) -> StageResult | None:
        """The failure of a stage that cannot begin."""
        if spec.select is not None:
            try:
                choose(spec, bound, self.pipeline)
            except StageError as error:
                return self.executor.failed(spec, error)
        for artifact in (artifact for artifacts in bound.values() for artifact in artifacts):
            if not artifact.path.exists():
                gone = InputError(f"its input {artifact.id[:19]} is gone: {artifact.path}", hint="run the same again")
                return self.executor.failed(spec, gone)
        return None

    def _start(self, spec: StageSpec, bound: Bound, decision: Decision) -> bool:
        """Start a stage if there is room for it, and no other stage of this run does the very same work."""
        work = decision.keys.resume if decision.keys else ""
        if work in self._work.values():
            del self._decided[spec.id]  # what is running now may be its result
            return False
        grant = self._slots.take(spec)
        if grant is None:
            return False
        self._work[spec.id] = work
        self.progress.start(spec.id)

        def watch() -> None:
            try:
                self._ended.put((spec, grant, self.executor.run(spec, bound, decision, grant)))
            except BaseException as error:  # it belongs to the thread that waits
                self._ended.put((spec, grant, error))

        thread = threading.Thread(target=watch, name=spec.id)
        self._running[spec.id] = thread
        thread.start()
        return True

    def _skip_reason(self, spec: StageSpec) -> str:
        """Why a stage cannot run whatever else happens, empty if it may."""
        if self.options.stopping or "stopped" in self._blocked.values():
            return "the run was stopped"
        for id in self._dependencies[spec.id]:
            if id in self._blocked:
                how = self._blocked[id]
                return f"a gate of `{id}` failed" if how == "gate" else f"`{id}` {WAS[how]}"
        return ""

    def _ending(self) -> str:
        """Why nothing new is started, empty if it is."""
        failed = next((id for id, how in self._blocked.items() if how == "failed"), "")
        if not failed or self.options.keep_going:
            return ""
        return f"`{failed}` failed; --keep-going runs what does not depend on it"

    # -- ending -------------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Settle the next stage that ends; come back without one if somebody asks to stop meanwhile."""
        stopping = self.options.stopping
        while True:
            if self.options.tick is not None:
                self.options.tick()
            try:
                spec, grant, result = self._ended.get(timeout=PAUSE)
                break
            except queue.Empty:
                if self.options.stopping != stopping:
                    return
        self._running.pop(spec.id).join()
        del self._work[spec.id]
        self._slots.give_back(grant)
        if isinstance(result, BaseException):
            raise result
        if result.status == "done":
            self.durations.remember(spec, result.seconds)
        self._finish(spec, result)

    def _finish(self, spec: StageSpec, result: StageResult) -> None:
        """Settle one stage and say how far the run is."""
        self.results[spec.id] = result
        self._decided.pop(spec.id, None)
        if result.ok:
            self.settlement.outputs[spec.id] = {**result.known, **result.outputs}
            if why := self.settlement.settle(spec, result):
                self._blocked[spec.id] = why
            for stage in self.collector.settled(spec, self.results):
                self.events("log", stage=stage, text="collected: nothing in this run needs its outputs any more")
        else:
            self._blocked[spec.id] = result.status
        self.progress.end(spec.id, result.seconds if result.status == "done" else 0.0)
        self._say_progress(now=result.status == "done" or len(self.results) == len(self.specs))

    def _verdict(self, stages: Mapping[str, StageResult]) -> tuple[int, str, str]:
        """Exit code, line and hint: a signal before a failure, a failure before a gate."""
        stop = self.options.stop
        if stop is not None and stop.requests and any(not result.ok for result in stages.values()):
            return stop.code, "stopped; finished stages are kept", "run the same command again to continue"
        for result in stages.values():
            if result.code:
                where = f"log: {result.log}" if result.log else ""
                hint = "; ".join(part for part in (result.hint, where) if part)
                made = any(other.status == "done" and other.choice is None for other in stages.values())
                # 2 means that nothing ran: it is not so if others were made before one refused its parameters.
                code = StageError.exit_code if made and result.code == UsageError.exit_code else result.code
                return code, f"`{result.id}`: {result.message}", hint
        missed = [g for r in stages.values() for g in r.gates if not g.ok and g.on_fail == "stop"]
        if missed:
            more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
            hint = f"numbers: llmctl show {self.pipeline.name}/{missed[0].stage}; `--gates warn` goes on anyway"
            return GateError.exit_code, f"gate failed: {missed[0].message}{more}", hint
        return 0, "", ""
