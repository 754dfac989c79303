"""Checks of what a spec asks for, by the rules of `run`: extras, secrets, cores, memory, disk, GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmctl.doctor.finding import Finding, State
from llmctl.doctor.packages import missing
from llmctl.doctor.world import World
from llmctl.errors import LlmctlError, MachineError, UsageError
from llmctl.launch.secrets import names_of
from llmctl.pipeline.selection import select
from llmctl.spec.resolved import Pipeline, StageSpec


def spec(world: World) -> Iterator[Finding]:
    """All that the spec on the command line needs and that is not here.

    What only stages need that act on the world, and so run when named with --to, is a warning.
    """
    if world.spec is None:
        return
    try:
        pipeline = world.spec()
    except LlmctlError as error:
        yield Finding(
            "spec", "problem", " ".join(error.message.split("\n")[0].split()), error.hint or "llmctl check SPEC"
        )
        return
    found = [*_extras(world, pipeline), *_secrets(world, pipeline), *_resources(world, pipeline)]
    yield from found
    if not found:
        yield Finding("spec", "ok", f"{pipeline.name}: everything that it asks for is here")


def _state(pipeline: Pipeline, stages: Iterable[StageSpec]) -> State:
    """How bad it is that these stages cannot run."""
    try:
        usual = {stage.id for stage in select(pipeline).specs}
    except UsageError:  # every stage acts on the world, so that each runs only when it is named
        usual = set()
    return "problem" if any(stage.id in usual for stage in stages) else "warning"


def _extras(world: World, pipeline: Pipeline) -> Iterator[Finding]:
    users: dict[str, list[StageSpec]] = {}
    for stage in pipeline.stages.values():
        if stage.stage.extra:
            users.setdefault(stage.stage.extra, []).append(stage)
    for extra, stages in users.items():
        if lacking := missing(world, extra):
            names = ", ".join(dict.fromkeys(stage.base or stage.id for stage in stages))
            text = f"{names} cannot run without {', '.join(lacking)}"
            yield Finding("spec", _state(pipeline, stages), text, world.extra(extra))


def _secrets(world: World, pipeline: Pipeline) -> Iterator[Finding]:
    """Whether the secrets that stages are given are there; one that is declared and not used is not asked for."""
    for name in names_of(pipeline.stages.values()):
        if pipeline.secrets[name].origin == "command":
            continue  # it is run when a stage starts, not to see whether it would
        users = [stage for stage in pipeline.stages.values() if name in names_of([stage])]
        try:
            world.secret(pipeline.secrets[name])
        except MachineError as error:
            yield Finding("spec", _state(pipeline, users), error.message, error.hint or "")


def _resources(world: World, pipeline: Pipeline) -> Iterator[Finding]:
    told: set[str] = set()
    for stage in pipeline.stages.values():
        try:
            world.fits(stage)
        except MachineError as error:
            if (hint := error.hint or "") not in told:  # rows of a matrix ask for the same, and are mended together
                told.add(hint)
                yield Finding("spec", _state(pipeline, [stage]), error.message, hint)
