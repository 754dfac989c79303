"""`llmctl verify-resume`: does a training that is stopped half-way end as one that is not, bit for bit?"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.errors import LlmctlError, StageError, TempFail, UsageError
from llmctl.pipeline.commands import spec_store
from llmctl.spec.options import spec_layers
from llmctl.store.commands import store_option
from llmctl.testing.differences import Difference, checkpoint_differences, file_differences
from llmctl.testing.phase import Phase

if TYPE_CHECKING:
    from llmctl.spec.overrides import Setting
    from llmctl.spec.resolved import Pipeline, StageSpec
    from llmctl.stage import Artifact
    from llmctl.store import Store


@click.command("verify-resume")
@click.argument("spec", metavar="SPEC")
@spec_layers
@click.option("--stage", metavar="STAGE", help="Which training stage; without it the first one.")
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="How long to train; the second time it is stopped after half of them.",
)
@store_option
def verify_resume(
    spec: str,
    profiles: tuple[str, ...],
    sets: tuple[Setting, ...],
    stage: str | None,
    steps: int,
    store_path: Path | None,
) -> None:
    """Train a stage of SPEC twice, once stopped half-way and resumed, and compare bit for bit.

    Weights, optimizer state, random states, every point of the curves and the output must be the same; exit 3 and the
    first difference by name if they are not. What lies before the stage is run as `run` does; the stage's own results
    in the store are left alone.
    """
    from llmctl.registry import get_registry
    from llmctl.spec.pipeline import load_pipeline
    from llmctl.store import Store

    pipeline = load_pipeline(spec, profiles, sets, registry=get_registry())
    store = Store.open(store_path or spec_store(pipeline))
    chosen = training_stage(pipeline, stage)
    params = shortened(chosen, steps)
    steps = params["max_steps"]
    inputs = inputs_of(pipeline, store, chosen)
    with tempfile.TemporaryDirectory(prefix="llmctl-resume-") as directory:
        differences, tensors = compare(chosen, params, inputs, Path(directory))
    half = steps // 2
    if differences:
        raise StageError(
            f"{chosen.id}: {steps} steps at once and {half} + {steps - half} differ in {len(differences)} places, "
            f"first in {differences[0]}",
            hint="something that training depends on is not in the checkpoint, or not deterministic on this device",
        )
    click.echo(
        f"{chosen.id}: {steps} steps at once and {half} + {steps - half} end bit for bit the same: "
        f"{tensors} tensors (weights, optimizer, random states), the curves, the output"
    )


def training_stage(pipeline: Pipeline, name: str | None) -> StageSpec:
    """The stage to look at; UsageError if it is none that trains, or trains in several processes."""
    training = [
        one for one in pipeline.stages.values() if {"max_steps", "save_every"} <= set(type(one.params).model_fields)
    ]
    named = [one for one in training if name in (None, one.id, one.base)]
    if not named:
        ids = ", ".join(one.id for one in training) or "none"
        what = f"`{pipeline.name}` has no stage that trains" if name is None else f"`{name}` is no stage that trains"
        raise UsageError(what, hint=f"stages that train: {ids}")
    if named[0].params.processes() > 1:
        raise UsageError(
            f"`{named[0].id}` trains in {named[0].params.processes()} processes, which this cannot start",
            hint=f"--set {named[0].id}.parallel='{{}}'",
        )
    return named[0]


def shortened(spec: StageSpec, steps: int) -> dict[str, Any]:
    """Its parameters for a training of `steps` at the most, with a point of the curves at each."""
    given = spec.params.model_dump(mode="json")
    return {**given, "max_steps": min(steps, given["max_steps"] or steps), "log_every": 1}


def inputs_of(pipeline: Pipeline, store: Store, spec: StageSpec) -> Mapping[str, Sequence[Artifact]]:
    """The artifacts that the stage reads; what makes them is run first. Raises what `run` raises."""
    from llmctl.pipeline.inputs import Inputs
    from llmctl.pipeline.plan import Planner
    from llmctl.pipeline.selection import select
    from llmctl.pipeline.session import run_session
    from llmctl.registry import get_registry

    if spec.dependencies:
        error = run_session(pipeline, store, to=spec.dependencies).error()
        if error is not None:
            raise error
    store.create()
    inputs = Inputs(pipeline, store)
    decisions = Planner(pipeline, store, get_registry()).plan(select(pipeline, (spec.id,), None, None).specs, inputs)
    bound = inputs.bind(spec, {one.id: one.outputs for one in decisions if not one.works})
    if bound is None:
        raise StageError(f"the inputs of `{spec.id}` are not in the store", hint="a stage with `cache: off` makes them")
    return bound


def compare(
    spec: StageSpec, params: Mapping[str, Any], inputs: Mapping[str, Sequence[Artifact]], directory: Path
) -> tuple[list[Difference], int]:
    """Train at once and in two halves below `directory`; where they differ, and how many tensors were compared."""
    for name in ("whole", "halves"):
        resume = directory / name / "resume"
        for stop in (0,) if name == "whole" else (params["max_steps"] // 2, 0):
            rows = {port: [{**asdict(one), "path": str(one.path)} for one in given] for port, given in inputs.items()}
            work = directory / name / ("stopped" if stop else "output")
            run(Phase(spec.stage.name, params, rows, str(work), str(resume), stop))
    whole, halves = directory / "whole", directory / "halves"
    end = f"resume/ckpt/step-{params['max_steps']}"
    if not (whole / end).is_dir():
        raise UsageError(f"`{spec.id}` keeps no checkpoint of its last step, which could be compared")
    differences, tensors = checkpoint_differences(whole / end, halves / end)
    return [*differences, *file_differences(whole / "output", halves / "output")], tensors


def run(phase: Phase) -> None:
    """Run a phase in a process of its own: nothing may survive in memory. StageError if it fails."""
    words = [sys.executable, "-P", "-m", "llmctl.testing.phase"]
    done = subprocess.run(words, input=json.dumps(asdict(phase)), stdout=subprocess.PIPE, text=True)
    expected = TempFail.exit_code if phase.stop else 0
    if done.returncode == expected:
        return
    lines = done.stdout.splitlines()
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if phase.stop and done.returncode == 0:
        raise LlmctlError(f"`{phase.stage}` was told to stop after step {phase.stop} and went on to the end")
    raise StageError(
        said.get("message", f"`{phase.stage}` ended with exit code {done.returncode}"), hint=said.get("hint")
    )
