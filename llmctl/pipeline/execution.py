"""Execute one stage: take its lock, write its request, watch its process, say what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmctl.errors import BusyError
from llmctl.launch.environment import stage_environment
from llmctl.launch.failures import Failure
from llmctl.launch.local import GRACE, Job, StageProcess
from llmctl.launch.request import Request
from llmctl.launch.signals import Stop
from llmctl.pipeline.events import EventLog
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.machine import git_state
from llmctl.pipeline.plan import Decision, Planner
from llmctl.pipeline.result import StageResult
from llmctl.spec.resolved import Pipeline, StageSpec
from llmctl.stage import Artifact
from llmctl.store import Store
from llmctl.store.keys import Keys
from llmctl.store.locks import Lock, holder, try_lock
from llmctl.store.store import Pointer

LOCK_PAUSE = 0.2
MOST_RUNNERS = 100
TYPES = {"progress": "stage.progress", "checkpoint": "stage.checkpoint"}
"""Events of a stage whose name in the run's events differs."""

Bound = Mapping[str, Sequence[Artifact]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run behaves; see `run_pipeline`."""

    on_busy: Literal["wait", "fail", "run"] = "wait"
    gates: Literal["stop", "warn"] = "stop"
    stop: Stop | None = None
    tick: Callable[[], None] | None = None

    @property
    def stopping(self) -> bool:
        """Whether somebody asked to stop."""
        return self.stop is not None and self.stop.requests > 0


class Executor:
    """Runs stages of one pipeline, one process each."""

    def __init__(
        self,
        pipeline: Pipeline,
        store: Store,
        planner: Planner,
        inputs: Inputs,
        events: EventLog,
        options: Options,
        progressed: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._pipeline = pipeline
        self._store = store
        self._planner = planner
        self._inputs = inputs
        self._events = events
        self._options = options
        self._progressed = progressed
        self._git: str | None = None

    def cached(self, spec: StageSpec, pointer: Pointer) -> StageResult:
        """The result of an earlier run."""
        self._events("stage.cached", stage=spec.id, key=pointer.key)
        return StageResult(
            id=spec.id,
            status="cached",
            key=pointer.key,
            outputs={port: self._store.get(id) for port, id in pointer.outputs.items()},
            metrics=pointer.metrics,
            seconds=pointer.seconds,
        )

    def run(self, spec: StageSpec, bound: Bound, decision: Decision) -> StageResult:
        """Make the stage's result, or find that another runner has made it while this one waited."""
        keys = decision.keys
        if keys is None:
            raise RuntimeError(f"`{spec.id}` has no key although its inputs are there")
        self._events("stage.queued", stage=spec.id, key=keys.action, why=list(decision.why))
        try:
            lock, work = self._acquire(spec, keys)
        except BusyError as error:
            return self._failed(spec, keys, Failure(code=error.exit_code, message=error.message, hint=error.hint or ""))
        if lock is None:
            return StageResult(id=spec.id, status="stopped", key=keys.action, message="stopped while it waited")
        with lock:
            again = self._planner.decide(spec, bound)
            if again.pointer is not None:
                return self.cached(spec, again.pointer)
            return self._execute(spec, bound, keys, lock, work)

    def _acquire(self, spec: StageSpec, keys: Keys) -> tuple[Lock | None, int]:
        """The lock and the number of its work directory; None if the run was stopped while it waited."""
        path = self._store.lock(keys.resume)
        told = False
        while not self._options.stopping:
            if lock := try_lock(path, self._events.run):
                return lock, 1
            if spec.stage.effect:
                # Acting twice is no duplicate work: a second server must say that its port is taken, not wait.
                return self._second(keys)
            if self._options.on_busy == "fail":
                hint = "--on-busy wait waits for it, --on-busy run does the work twice"
                raise BusyError(f"another process does the same work: {holder(path)}", hint=hint)
            if self._options.on_busy == "run":
                return self._second(keys)
            if not told:
                told = True
                text = f"another process does the same work, waiting for it: {holder(path)}"
                self._events("log", stage=spec.id, text=text)
            if self._options.tick is not None:
                self._options.tick()
            time.sleep(LOCK_PAUSE)
        return None, 1

    def _second(self, keys: Keys) -> tuple[Lock, int]:
        """A lock and a work directory beside those in use."""
        for number in range(2, MOST_RUNNERS):
            if lock := try_lock(self._store.lock(keys.resume, number), self._events.run):
                return lock, number
        raise BusyError(f"{MOST_RUNNERS} processes do the same work", hint="wait for one of them")

    def _execute(self, spec: StageSpec, bound: Bound, keys: Keys, lock: Lock, work: int) -> StageResult:
        origin = self._planner.registry.origin(spec.stage.name)
        if self._git is None:
            self._git = git_state(self._pipeline.base)
        Request(
            key=keys.action,
            resume=keys.resume,
            preimage=keys.preimage,
            stage=spec.stage.name,
            instance=spec.id,
            plugin={"dist": origin.dist, "version": origin.version, "rev": spec.stage.rev},
            params=spec.params.model_dump_json(round_trip=True),
            inputs=bound,
            outputs=output_types(spec, bound),
            snapshots=self._inputs.snapshots(bound),
            memory=spec.resources.memory,
            observed={"git": self._git} if self._git else {},
        ).write(self._store)
        job = Job(
            key=keys.action,
            instance=spec.id,
            run=self._events.run,
            log=self._store.run(self._events.run) / "logs" / f"{spec.id}.log",
            environment=stage_environment(
                {name: item.value for name, item in spec.env.items()}, spec.resources.cpus, spec.resources.gpus
            ),
            owner=origin.dist,
            work=work,
            publish=self._publish(spec),
            lock=lock,
            time_limit=spec.resources.time,
        )
        return self._supervise(spec, keys, job)

    def _publish(self, spec: StageSpec) -> str:
        """How the result becomes known: not at all, over an older one, or as the first."""
        if spec.stage.effect or spec.cache == "off":
            return "no"
        return "replace" if self._planner.refresh or spec.cache == "refresh" else "first"

    def _supervise(self, spec: StageSpec, keys: Keys, job: Job) -> StageResult:
        self._events("stage.start", stage=spec.id, key=keys.action, attempt=1, launcher="local", log=str(job.log))
        begun = time.monotonic()
        told = False

        def tick() -> None:
            nonlocal told
            if self._options.stopping and not told:
                told = True
                text = f"stopping: waiting up to {GRACE:.0f} s for a checkpoint, again to stop at once"
                self._events("log", stage=spec.id, text=text)
            if self._options.tick is not None:
                self._options.tick()

        process = StageProcess(self._store, job)
        outcome = process.supervise(lambda event: self._pass_on(spec, event), self._options.stop, tick)
        seconds = time.monotonic() - begun
        if outcome.failure is not None:
            self._store.sweep()
            return self._failed(spec, keys, outcome.failure, job, seconds, stopped=outcome.stopped)
        outputs = {port: self._store.get(id) for port, id in outcome.outputs.items()}
        headline = {name: outcome.metrics[name] for name in spec.stage.headline if name in outcome.metrics}
        self._events("stage.end", stage=spec.id, code=0, seconds=round(seconds, 3), metrics=headline)
        return StageResult(
            id=spec.id,
            status="done",
            key=keys.action,
            outputs=outputs,
            metrics=outcome.metrics,
            seconds=seconds,
            log=job.log,
        )

    def _pass_on(self, spec: StageSpec, event: dict[str, Any]) -> None:
        kind = str(event.pop("type", "log"))
        self._events(TYPES.get(kind, kind), **{**event, "stage": spec.id})
        if kind == "progress":
            self._progressed(event)

    def _failed(
        self,
        spec: StageSpec,
        keys: Keys,
        failure: Failure,
        job: Job | None = None,
        seconds: float = 0.0,
        *,
        stopped: bool = False,
    ) -> StageResult:
        log = str(job.log) if job else None
        self._events(
            "stage.end",
            stage=spec.id,
            code=failure.code,
            seconds=round(seconds, 3),
            message=failure.message,
            hint=failure.hint,
            log=log,
            stopped=stopped,
        )
        return StageResult(
            id=spec.id,
            status="stopped" if stopped or failure.code == 75 else "failed",
            key=keys.action,
            seconds=seconds,
            code=failure.code,
            message=failure.message,
            hint=failure.hint,
            log=job.log if job else None,
        )


def output_types(spec: StageSpec, bound: Bound) -> dict[str, str]:
    """The type of every output; one that is `same_as` an input has the type that the input really has."""
    types = {}
    for port, type in spec.outputs.items():
        source = bound.get(spec.stage.outputs[port].same_as)
        types[port] = source[0].type if source else type
    return types
