"""Execute one stage: take its lock, write its request, watch its process, say what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmctl.errors import BusyError, LlmctlError, MachineError, StageError, TempFail
from llmctl.launch.environment import stage_environment
from llmctl.launch.failures import Failure
from llmctl.launch.heartbeats import Watch
from llmctl.launch.local import Job, StageProcess
from llmctl.launch.request import Request
from llmctl.launch.signals import Stop
from llmctl.launch.stopping import GRACE
from llmctl.pipeline.choice import Choice
from llmctl.pipeline.events import EventLog
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.keyring import Keyring
from llmctl.pipeline.machine import git_state
from llmctl.pipeline.plan import Bound, Decision, Planner
from llmctl.pipeline.result import StageResult
from llmctl.pipeline.slots import Grant
from llmctl.spec.resolved import Pipeline, StageSpec
from llmctl.stage import SAVE_FILE, STOP_FILE
from llmctl.store import Store, names
from llmctl.store.keys import Keys
from llmctl.store.locks import Lock, holder, try_lock

LOCK_PAUSE = 0.2
MOST_RUNNERS = 100
RETRIED = (1, StageError.exit_code)
"""Exit codes after which `retries` begins again: bugs, crashes and failures, but nothing that would fail alike."""
TYPES = {"progress": "stage.progress", "checkpoint": "stage.checkpoint"}
"""Events of a stage whose name in the run's events differs."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run behaves; see `run_pipeline`."""

    on_busy: Literal["wait", "fail", "run"] = "wait"
    gates: Literal["stop", "warn"] = "stop"
    jobs: int = 1
    keep_going: bool = False
    grace: float = GRACE
    stop: Stop | None = None
    tick: Callable[[], None] | None = None

    @property
    def stopping(self) -> bool:
        """Whether somebody asked to stop."""
        return self.stop is not None and self.stop.requests > 0


class Aborted(Exception):
    """The run is over by a bug: what still runs must end, and its result is nobody's."""


class Executor:
    """Runs stages of one pipeline, one process each; several threads may run one at a time each."""

    def __init__(
        self,
        pipeline: Pipeline,
        store: Store,
        planner: Planner,
        inputs: Inputs,
        events: EventLog,
        options: Options,
        keyring: Keyring,
        progressed: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._pipeline = pipeline
        self._store = store
        self._planner = planner
        self._inputs = inputs
        self._events = events
        self._options = options
        self._keyring = keyring
        self._progressed = progressed
        self._git: str | None = None
        self._aborted = False

    def abort(self) -> None:
        """End every running stage at once."""
        self._aborted = True

    def cached(self, spec: StageSpec, decision: Decision) -> StageResult:
        """The result of an earlier run."""
        pointer = decision.pointer
        if pointer is None:
            raise RuntimeError(f"`{spec.id}` has no cached result")
        self._events("stage.cached", stage=spec.id, key=pointer.key)
        there = {port: item for port, item in decision.outputs.items() if not decision.collected or item.path.is_dir()}
        return StageResult(
            id=spec.id,
            status="cached",
            key=pointer.key,
            outputs=there,
            known=decision.outputs,
            metrics=pointer.metrics,
            seconds=pointer.seconds,
            collected=decision.collected,
        )

    def chosen(self, spec: StageSpec, choice: Choice) -> StageResult:
        """The result of a `select` stage."""
        number = {choice.metric: choice.value}
        self._events("stage.end", stage=spec.id, code=0, seconds=0.0, metrics=number, choice=choice.to_json())
        return StageResult(id=spec.id, status="done", outputs=choice.outputs, choice=choice)

    def failed(self, spec: StageSpec, error: LlmctlError, key: str = "") -> StageResult:
        """The result of a stage that cannot begin."""
        failure = Failure(code=error.exit_code, message=error.message, hint=error.hint or "")
        return self._failed(spec, key, failure)

    def run(self, spec: StageSpec, bound: Bound, decision: Decision, grant: Grant) -> StageResult:
        """Make the stage's result, or find that another runner has made it while this one waited."""
        keys = decision.keys
        if keys is None:
            raise RuntimeError(f"`{spec.id}` has no key although its inputs are there")
        self._events("stage.queued", stage=spec.id, key=keys.action, why=list(decision.why))
        try:
            lock, work = self._acquire(spec, keys)
        except BusyError as error:
            return self.failed(spec, error, keys.action)
        if lock is None:
            return StageResult(id=spec.id, status="stopped", key=keys.action, message="stopped while it waited")
        with lock:
            again = self._planner.decide(spec, bound)
            if again.pointer is not None:
                return self.cached(spec, again)
            # An old request to stop is no reason not to begin; one to a runner beside us is not ours.
            for file in (STOP_FILE, SAVE_FILE):
                (self._store.work(keys.resume, work) / file).unlink(missing_ok=True)
            try:
                self._keyring.look_up([spec])  # what was cached in the plan had no need of secrets
            except MachineError as error:
                return self.failed(spec, error, keys.action)
            self._keyring.guard(self._events)
            return self._attempts(spec, keys, self._job(spec, bound, keys, lock, work, grant))

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
            self._check_aborted()
            time.sleep(LOCK_PAUSE)
        return None, 1

    def _second(self, keys: Keys) -> tuple[Lock, int]:
        """A lock and a work directory beside those in use."""
        for number in range(2, MOST_RUNNERS):
            if lock := try_lock(self._store.lock(keys.resume, number), self._events.run):
                return lock, number
        raise BusyError(f"{MOST_RUNNERS} processes do the same work", hint="wait for one of them")

    def _job(self, spec: StageSpec, bound: Bound, keys: Keys, lock: Lock, work: int, grant: Grant) -> Job:
        """Write the stage's request; returns what to start."""
        origin = self._planner.origin(spec)
        if self._git is None:
            self._git = git_state(self._pipeline.base)
        own = [name for name, item in spec.env.items() if item.secret]
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
            nodes=spec.resources.nodes or 1,
            secrets=own,
            observed={"git": self._git} if self._git else {},
        ).write(self._store)
        declared, hidden = self._keyring.variables(spec), self._keyring.hidden
        devices = None if spec.resources.gpus is None else grant.devices
        return Job(
            key=keys.action,
            instance=spec.id,
            run=self._events.run,
            log=self._store.run(self._events.run) / "logs" / f"{names.file_name(spec.id)}.log",
            environment=stage_environment(declared, spec.resources.cpus, devices, hidden=hidden),
            owner=origin.dist,
            work=work,
            publish=self._publish(spec),
            lock=lock,
            time_limit=spec.resources.time,
            masker=self._events.masker,
            masks_log=bool(own),
        )

    def _attempts(self, spec: StageSpec, keys: Keys, job: Job) -> StageResult:
        """Run it until it is done, or its retries are used up, or it fails in a way that another attempt cannot mend.

        Every attempt continues from the last checkpoint in the same work directory.
        """
        most = 1 + spec.retries
        while True:
            result, again = self._supervise(spec, keys, job, last=job.attempt == most)
            result.attempts = job.attempt
            if not again:
                return result
            text = f"attempt {job.attempt} of {most} failed with exit {result.code}: {result.message}; trying again"
            self._events("warning", stage=spec.id, text=text)
            job = replace(job, attempt=job.attempt + 1)
            with job.log.open("a", encoding="utf-8") as log:
                log.write(f"--- attempt {job.attempt} of {most} ---\n")

    def _publish(self, spec: StageSpec) -> str:
        """How the result becomes known: not at all, over an older one, or as the first."""
        if spec.stage.effect or spec.cache == "off":
            return "no"
        return "replace" if self._planner.refresh or spec.cache == "refresh" else "first"

    def _supervise(self, spec: StageSpec, keys: Keys, job: Job, *, last: bool) -> tuple[StageResult, bool]:
        """One attempt and whether to make another; the end of the stage is told of the `last` one only."""
        self._events(
            "stage.start", stage=spec.id, key=keys.action, attempt=job.attempt, launcher="local", log=str(job.log)
        )
        begun = time.monotonic()
        told = False
        watch = Watch(self._store.work(keys.resume, job.work))

        def tick() -> None:
            nonlocal told
            self._check_aborted()
            if text := watch.look():
                self._events("warning", stage=spec.id, text=text)
            if self._options.stopping and not told:
                told = True
                text = f"stopping: waiting up to {self._options.grace:g} s for a checkpoint, again to stop at once"
                self._events("log", stage=spec.id, text=text)

        process = StageProcess(self._store, job, self._options.grace)
        outcome = process.supervise(lambda event: self._pass_on(spec, event), self._options.stop, tick)
        seconds = time.monotonic() - begun
        if outcome.failure is not None:
            self._store.sweep()
            final = last or outcome.failure.code not in RETRIED or outcome.stopped or self._options.stopping
            failed = self._failed(
                spec, keys.action, outcome.failure, job, seconds, stopped=outcome.stopped, final=final
            )
            return failed, not final
        outputs = {port: self._store.get(id) for port, id in outcome.outputs.items()}
        headline = {name: outcome.metrics[name] for name in spec.stage.headline if name in outcome.metrics}
        self._events("stage.end", stage=spec.id, code=0, seconds=round(seconds, 3), metrics=headline)
        done = StageResult(id=spec.id, status="done", key=keys.action, outputs=outputs, metrics=outcome.metrics)
        done.seconds, done.log = seconds, job.log
        return done, False

    def _check_aborted(self) -> None:
        if self._aborted:
            raise Aborted

    def _pass_on(self, spec: StageSpec, event: dict[str, Any]) -> None:
        kind = str(event.pop("type", "log"))
        self._events(TYPES.get(kind, kind), **{**event, "stage": spec.id})
        if kind == "progress":
            self._progressed(spec.id, event)

    def _failed(
        self,
        spec: StageSpec,
        key: str,
        failure: Failure,
        job: Job | None = None,
        seconds: float = 0.0,
        *,
        stopped: bool = False,
        final: bool = True,
    ) -> StageResult:
        """The result of a failure, told as the end of the stage if it is `final`."""
        log = job.log if job else None
        stopped = stopped or failure.code == TempFail.exit_code
        if final:
            said: dict[str, Any] = {"message": failure.message, "hint": failure.hint, "log": str(log) if log else None}
            said |= {"seconds": round(seconds, 3), "stopped": stopped}
            self._events("stage.end", stage=spec.id, code=failure.code, **said)
        return StageResult(
            id=spec.id,
            status="stopped" if stopped else "failed",
            key=key,
            seconds=seconds,
            code=failure.code,
            message=failure.message,
            hint=failure.hint,
            log=log,
        )


def output_types(spec: StageSpec, bound: Bound) -> dict[str, str]:
    """The type of every output; one that is `same_as` an input has the type that the input really has."""
    types = {}
    for port, type in spec.outputs.items():
        source = bound.get(spec.stage.outputs[port].same_as)
        types[port] = source[0].type if source else type
    return types
