"""Run one stage in this process, without a store, a runner or a spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.stage import Artifact, Context, Stage


@dataclass
class StageResult:
    """What a stage left: its outputs as artifacts, its final numbers and every event it emitted."""

    outputs: dict[str, Artifact]
    metrics: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    asked: int = 0
    """How often the stage asked `should_stop`."""

    def curve(self, name: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of a metric that was recorded step by step."""
        rows = (event for kind, event in self.events if kind == "metric")
        return [(row["step"], row["value"]) for row in rows if row["name"] == name and "step" in row]


def run_stage(
    stage: Stage,
    directory: Path,
    params: Mapping[str, Any] | None = None,
    stop_after: int | None = None,
    **inputs: Artifact | list[Artifact] | None,
) -> StageResult:
    """Run `stage` in `directory` with `params` as a spec would give them.

    Outputs land in `directory/<port>`; `directory/.resume` is the resume directory, so a second call in the same
    directory resumes. `stop_after=n` makes `should_stop` true from the n-th time it is asked, as a signal would.
    """
    values = stage.load_params().model_validate(dict(params or {}))
    bound = {port: _as_declared(stage, port, inputs.get(port)) for port in stage.inputs}
    return execute(stage, values, bound, directory, directory / ".resume", stop_after)


def _as_declared(stage: Stage, port: str, given: Artifact | list[Artifact] | None) -> Artifact | list[Artifact] | None:
    """A port that takes several gets a list, also of one."""
    return [given] if stage.inputs[port].many and isinstance(given, Artifact) else given


def execute(
    stage: Stage,
    params: Any,
    inputs: Mapping[str, Artifact | list[Artifact] | None],
    directory: Path,
    resume: Path,
    stop_after: int | None = None,
    events: list[tuple[str, dict[str, Any]]] | None = None,
) -> StageResult:
    """Run `stage` with validated `params`; outputs land in `directory/<port>`, `resume` is the resume directory.

    What it emits is added to `events`, which thus has it also if the stage raises.
    """
    ports = params.outputs() or set(stage.outputs)
    events = [] if events is None else events
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked >= stop_after

    context = Context(
        stage.name,
        {port: directory / port for port in ports},
        resume,
        lambda kind, fields: events.append((kind, dict(fields))),
        stop,
    )
    stage.load_run()(context, params, **inputs)
    outputs = {
        port: Artifact(directory / port, output_type(stage, port, inputs), "", context.metadata[port])
        for port in sorted(ports)
    }
    return StageResult(outputs, dict(context.reported), events, asked)


def output_type(stage: Stage, port: str, inputs: Mapping[str, Artifact | list[Artifact] | None]) -> str:
    """The artifact type of an output; one that is `same_as` an input has the type that the input has."""
    out = stage.outputs[port]
    same = inputs.get(out.same_as)
    same = same[0] if isinstance(same, list) and same else same
    return out.type or (same.type if isinstance(same, Artifact) else "")
