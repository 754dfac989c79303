"""`llmctl verify-resume`: a stage trained straight through, and one stopped on the way and continued, are the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.errors import LlmctlError, MachineError, StageError, TempFail, UsageError
from llmctl.launch.environment import stage_environment
from llmctl.launch.local import Job, Outcome, StageProcess
from llmctl.launch.request import Request
from llmctl.launch.signals import Stop, signals_stop
from llmctl.pipeline.commands import spec_store
from llmctl.pipeline.comparison import counted, damage, differences, value_differences
from llmctl.pipeline.execution import output_types
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.keyring import Keyring
from llmctl.pipeline.plan import Bound, Planner
from llmctl.spec.extent import has_extent
from llmctl.spec.options import spec_layers
from llmctl.store.commands import store_option
from llmctl.store.keys import Keys, make_keys
from llmctl.store.store import Store

if TYPE_CHECKING:
    from llmctl.registry import Origin
    from llmctl.spec.overrides import Setting
    from llmctl.spec.resolved import Pipeline, StageSpec

STEPS = "max_steps"
"""The parameter that says how far a stage goes."""
SAVES = "a stage has to ask ctx.should_stop() after every step, save all that the next step needs, and leave"
NO_CHANGES: Mapping[str, Any] = {}
SHOWN = 5
"""Differences that are named; there may be thousands."""


@click.command("verify-resume")
@click.argument("spec", metavar="SPEC")
@spec_layers
@click.option("--stage", metavar="STAGE", help="Only this stage; else every one that trains in steps.")
@click.option("--steps", type=click.IntRange(min=2), default=20, show_default=True, help="Steps to train.")
@click.option("--at", type=click.IntRange(min=1), help="The step to stop at.  [default: half of them]")
@click.option("--control", is_flag=True, help="Also damage one tensor of the checkpoint: that must be noticed.")
@store_option
def verify_resume(
    spec: str,
    profiles: tuple[str, ...],
    sets: tuple[Setting, ...],
    stage: str | None,
    steps: int,
    at: int | None,
    control: bool,
    store_path: Path | None,
) -> None:
    """Train a stage of SPEC, and train it again with a stop on the way: both must be the same bit for bit.

    Weights, optimizer, random states, curves and outputs are compared. What the stage needs is made first; what is
    trained here is thrown away.
    """
    from llmctl.registry import get_registry
    from llmctl.spec.pipeline import load_pipeline

    stop_at = at or steps // 2
    if stop_at >= steps:
        raise UsageError(f"--at {stop_at} leaves nothing of {steps} steps to be continued", hint="give a lower step")
    pipeline = load_pipeline(spec, profiles, sets, registry=get_registry())
    store = Store.open(store_path or spec_store(pipeline))
    chosen = trained(pipeline, stage)
    with signals_stop() as stop:
        for each, bound in with_inputs(pipeline, store, chosen):
            rehearsal = Rehearsal.of(pipeline, store, each, bound, steps, stop, {"log_every": 1})
            for line in rehearsal(stop_at, control):
                click.echo(line)


def trained(pipeline: Pipeline, stage: str | None) -> list[StageSpec]:
    """The stages to rehearse; UsageError if there are none."""
    from llmctl.pipeline.selection import instances

    named = [pipeline.stages[id] for id in instances(pipeline, stage)] if stage else list(pipeline.stages.values())
    found = [spec for spec in named if STEPS in type(spec.params).model_fields and has_extent(type(spec.params))]
    if not found:
        what = f"`{stage}` does not train" if stage else f"no stage of `{pipeline.name}` trains"
        raise UsageError(f"{what} in steps", hint=f"a stage that does has a parameter `{STEPS}`")
    return found


def with_inputs(pipeline: Pipeline, store: Store, chosen: list[StageSpec]) -> Iterator[tuple[StageSpec, Bound]]:
    """Each stage with its inputs, once all that they need has been made."""
    from llmctl.pipeline.selection import select
    from llmctl.pipeline.session import run_session
    from llmctl.registry import get_registry

    before = sorted({id for spec in chosen for id in spec.dependencies if id in pipeline.stages})
    made: dict[str, Any] = {}
    if before:
        inputs = Inputs(pipeline, store)
        specs = select(pipeline, before).specs
        inputs.check_paths(specs)
        decisions = Planner(pipeline, store, get_registry()).plan(specs, inputs)
        if any(decision.works for decision in decisions):
            result = run_session(pipeline, store, to=before)
            if error := result.error():
                raise error
            made = {id: {**one.known, **one.outputs} for id, one in result.stages.items()}
        else:
            made = {decision.id: decision.outputs for decision in decisions}
    store.create()
    inputs = Inputs(pipeline, store)
    inputs.check(chosen)
    for spec in chosen:
        bound = inputs.bind(spec, made)
        if bound is None:
            raise RuntimeError(f"the inputs of `{spec.id}` are not there although all it depends on is done")
        yield spec, bound


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One finished training: its work directory and what it made."""

    store: Store
    work: Path
    outcome: Outcome


@dataclass(kw_only=True)
class Rehearsal:
    """Trainings of one stage, each in a store of its own that is thrown away."""

    store: Store
    spec: StageSpec
    bound: Bound
    origin: Origin
    keys: Keys
    environment: dict[str, str]
    steps: int
    stop: Stop
    _first_steps: list[int] = field(default_factory=list, init=False)
    """The first step that each process has told of."""

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        store: Store,
        spec: StageSpec,
        bound: Bound,
        steps: int,
        stop: Stop,
        changes: Mapping[str, Any] = NO_CHANGES,
    ) -> Rehearsal:
        """The rehearsal of a stage of a pipeline, shortened to `steps`, with parameters that change no result."""
        from llmctl.registry import get_registry

        fields = type(spec.params).model_fields
        changed = {STEPS: steps, **{name: value for name, value in changes.items() if name in fields}}
        params = type(spec.params).model_validate({**spec.params.model_dump(round_trip=True), **changed})
        spec = replace(spec, params=params)
        keyring = Keyring(pipeline.secrets)
        keyring.look_up([spec])
        environment = stage_environment(keyring.variables(spec), spec.resources.cpus, hidden=keyring.hidden)
        origin = get_registry().origin(spec.stage.name)
        ids = {port: [artifact.id for artifact in artifacts] for port, artifacts in bound.items()}
        keys = make_keys(spec, origin, ids)
        return cls(store=store, spec=spec, bound=bound, origin=origin, keys=keys, environment=environment, steps=steps,
                   stop=stop)  # fmt: skip

    def __call__(self, at: int, control: bool) -> Iterator[str]:
        """Say that a stop after step `at` changes nothing, and that a damaged checkpoint would be noticed.

        StageError with the first difference if the stop does change something, or if the damage does not.
        """
        id, rest = self.spec.id, self.steps - at
        with self.scratch() as one, self.scratch() as other, self.scratch() as third:
            straight = self.train(one)
            self.halt(other, at)
            if control:
                shutil.copytree(other.work(self.keys.resume), third.work(self.keys.resume))
            found = list(self.differences(straight, self.train(other, after=at)))
            if found:
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                raise StageError(
                    f"`{id}`: {self.steps} steps are not {at} and {rest} more: {found[0]}{more}",
                    hint="; ".join(found[1:SHOWN]) or "the usual cause is a state that is in no checkpoint",
                )
            tensors, files = counted(straight.work)
            yield f"{id}: {self.steps} steps are {at} and {rest} more, bit for bit: {tensors} tensors in {files} files"
            if control:
                name = self.damaged(third)
                found = list(self.differences(straight, self.train(third, after=at)))
                if not found:
                    raise StageError(
                        f"`{id}`: nothing tells that {name} was set to zero in the checkpoint",
                        hint="the comparison is blind to it: please report this",
                    )
                yield f"{id}: control: with {name} set to zero in the checkpoint {len(found)} differences are found"

    def damaged(self, store: Store) -> str:
        """The name of a tensor in the work directory that was set to zero."""
        try:
            return damage(store.work(self.keys.resume))
        except ValueError as error:
            raise StageError(
                f"`{self.spec.id}` keeps no tensors in its work directory", hint="leave out --control"
            ) from error

    def differences(self, straight: Trained, continued: Trained) -> Iterator[str]:
        """What differs in state, outputs and final numbers."""
        yield from differences(straight.work, continued.work)
        for port in sorted({*straight.outcome.outputs, *continued.outcome.outputs}):
            a, b = (run.store.artifact(run.outcome.outputs[port]) for run in (straight, continued))
            yield from (f"output {port}, {what}" for what in differences(a, b))
        yield from value_differences(straight.outcome.metrics, continued.outcome.metrics)

    @contextmanager
    def scratch(self) -> Iterator[Store]:
        """An empty store inside the store, gone at the end; what a killed command leaves is swept like all else."""
        found = Store(self.store.temporary())
        found.create()
        try:
            yield found
        finally:
            shutil.rmtree(found.root)

    def train(self, store: Store, after: int = 0) -> Trained:
        """Train to the end; StageError unless that begins behind the step `after`."""
        self._first_steps.clear()
        outcome = self.process(store)
        if outcome.failure is not None:
            raise self.error(store, outcome)
        if after and (not self._first_steps or self._first_steps[0] <= after):
            begun = f"from step {self._first_steps[0]}" if self._first_steps else "made no step at all"
            raise StageError(
                f"`{self.spec.id}` was stopped after step {after} and did not go on from there but {begun}", hint=SAVES
            )
        return Trained(store=store, work=store.work(self.keys.resume), outcome=outcome)

    def halt(self, store: Store, at: int) -> None:
        """Train until the stage is asked to stop after step `at`; StageError if it goes on."""
        outcome = self.process(store, stop_at=at)
        if outcome.failure is None:
            raise StageError(
                f"`{self.spec.id}` was asked to stop after step {at} of {self.steps} and went on to its end",
                hint=SAVES,
            )
        if outcome.failure.code != TempFail.exit_code:
            raise self.error(store, outcome)

    def error(self, store: Store, outcome: Outcome) -> LlmctlError:
        """The failure of a process, with its log, which is about to be thrown away, kept."""
        assert outcome.failure is not None
        if outcome.stopped:
            return TempFail(f"`{self.spec.id}`: stopped; nothing was compared")
        kept = self.store.root / "verify-resume.log"
        shutil.copyfile(self.log(store), kept)
        kind = MachineError if outcome.failure.code == MachineError.exit_code else StageError
        hint = "; ".join(part for part in (outcome.failure.hint, f"log: {kept}") if part)
        return kind(f"`{self.spec.id}`: {outcome.failure.message}", hint=hint)

    def log(self, store: Store) -> Path:
        """What its processes print."""
        return store.root / "stage.log"

    def process(self, store: Store, stop_at: int = 0) -> Outcome:
        """Start the stage in a process of its own, as a run does, and wait for its end."""
        spec = self.spec
        Request(
            key=self.keys.action,
            resume=self.keys.resume,
            preimage=self.keys.preimage,
            stage=spec.stage.name,
            instance=spec.id,
            plugin={"dist": self.origin.dist, "version": self.origin.version, "rev": spec.stage.rev},
            params=spec.params.model_dump_json(round_trip=True),
            inputs=self.bound,
            outputs=output_types(spec, self.bound),
            memory=spec.resources.memory,
            nodes=spec.resources.nodes or 1,
            secrets=[name for name, item in spec.env.items() if item.secret],
        ).write(store)
        job = Job(
            key=self.keys.action,
            instance=spec.id,
            run="verify-resume",
            log=self.log(store),
            environment=self.environment,
            owner=self.origin.dist,
            publish="no",
            stop_at=stop_at,
        )
        return StageProcess(store, job).supervise(self._event, self.stop)

    def _event(self, event: dict[str, Any]) -> None:
        if event.get("type") == "progress" and event.get("step") and not self._first_steps:
            self._first_steps.append(int(event["step"]))
