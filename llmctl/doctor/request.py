"""Checks of what a spec asks for: extras, secrets, cores, memory, GPUs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from llmctl.console import human_bytes
from llmctl.doctor.finding import Finding
from llmctl.doctor.machine import memory_limit
from llmctl.doctor.packages import missing
from llmctl.doctor.world import World
from llmctl.errors import LlmctlError
from llmctl.spec.resolved import Pipeline, Secret, StageSpec


def spec(world: World) -> Iterator[Finding]:
    """All that the spec on the command line needs and that is not here."""
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


def _extras(world: World, pipeline: Pipeline) -> Iterator[Finding]:
    users: dict[str, list[str]] = {}
    for stage in pipeline.stages.values():
        if stage.stage.extra:
            users.setdefault(stage.stage.extra, []).append(stage.base or stage.id)
    for extra, stages in users.items():
        if lacking := missing(world, extra):
            names = ", ".join(dict.fromkeys(stages))
            yield Finding("spec", "problem", f"{names} cannot run without {', '.join(lacking)}", world.extra(extra))


def _secrets(world: World, pipeline: Pipeline) -> Iterator[Finding]:
    """Whether each secret is there; its value is not looked at, beyond being empty."""
    for secret in pipeline.secrets.values():
        if fault := _secret_fault(world, secret):
            fix = f"export {secret.variable}=…" if secret.origin == "env" else f"put the secret into {secret.path}"
            yield Finding("spec", "problem", f"secret {secret.name}: {fault}", fix)


def _secret_fault(world: World, secret: Secret) -> str:
    if secret.origin == "env":
        return "" if world.environ.get(secret.variable) else f"the variable {secret.variable} is not set"
    if secret.origin == "file":
        return "" if world.read(str(secret.path)).strip() else f"the file {secret.path} is missing or empty"
    return ""  # a command is run when a stage starts, not to see whether it would


def _resources(world: World, pipeline: Pipeline) -> Iterator[Finding]:
    limit = memory_limit(world)
    for stage in pipeline.stages.values():
        asked = stage.resources
        for name, what, wanted, there in (
            ("gpus", "GPUs", asked.gpus, len(world.gpus)),
            ("cpus", "cores", asked.cpus, world.affinity),
        ):
            if wanted is not None and wanted > there:
                text = f"{stage.id} asks for {wanted} {what}, this machine has {there}"
                yield Finding("spec", "problem", text, _lower(pipeline, stage, name, str(there)))
        if asked.gpu_type and not any(asked.gpu_type.lower() in gpu.lower() for gpu in world.gpus):
            here = ", ".join(world.gpus) or "none"
            text = f"{stage.id} asks for a GPU of type {asked.gpu_type}, this machine has {here}"
            yield Finding("spec", "problem", text, _lower(pipeline, stage, "gpu_type", "…"))
        if asked.memory is not None and limit is not None and asked.memory > limit:
            text = f"{stage.id} asks for {human_bytes(asked.memory)} of memory, {human_bytes(limit)} are here"
            yield Finding("spec", "problem", text, _lower(pipeline, stage, "memory", f"{limit >> 20}MiB"))


def _lower(pipeline: Pipeline, stage: StageSpec, name: str, value: str) -> str:
    """The command that runs the spec with what is here."""
    file = shlex.quote(str(pipeline.file)) if pipeline.file else "SPEC"
    return f"llmctl run {file} --set stages.{stage.base or stage.id}.resources.{name}={value}"
