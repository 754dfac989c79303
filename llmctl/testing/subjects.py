"""What is tested: a stage with examples of its use, from a test or from `llmctl-plugin.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import UsageError
from llmctl.stage import Artifact, Stage
from llmctl.store import types
from llmctl.testing import artifacts, baseline

Bound = Mapping[str, Artifact | Sequence[Artifact]]
KILLS = 4


@dataclass(frozen=True, kw_only=True)
class Example:
    """One use of a stage: parameters as a spec would give them, and what is bound to its inputs."""

    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Bound = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A stage and what is known about it. The first example is the one that is stopped and killed."""

    stage: Stage
    examples: Sequence[Example]
    unread: Mapping[str, str] = field(default_factory=dict)
    """Parameters that no example makes `run` read, with the reason."""
    recorded: Mapping[str, Any] | None = None
    record_file: str | None = None
    """Where `recorded` comes from; empty if there should be such a file and is none, None if nobody compares."""
    kills: int = KILLS


def subject(
    stage: Stage,
    file: baseline.PluginFile | None,
    directory: Path,
    params: Mapping[str, Any] | None = None,
    inputs: Bound | None = None,
) -> Subject:
    """A stage with its examples; inputs are made below `directory`. UsageError if an input cannot be made."""
    given = file.examples.get(stage.name, []) if file else []
    first = [{"params": params or {}, "inputs": inputs or {}}] if params or inputs or not given else []
    base = file.path.parent if file else Path.cwd()
    examples = [
        Example(params=raw.get("params", {}), inputs=dict(_inputs(stage, raw.get("inputs", {}), base, directory)))
        for raw in [*first, *given]
    ]
    return Subject(
        stage=stage,
        examples=examples,
        unread=file.unread.get(stage.name, {}) if file else {},
        recorded=file.recorded.get(stage.name) if file else None,
        record_file=str(file.path) if file else None,
    )


def _inputs(
    stage: Stage, given: Mapping[str, Any], base: Path, directory: Path
) -> Iterator[tuple[str, Artifact | list[Artifact]]]:
    """What is bound to each input: an artifact, the type of one to make, a path, or a list of those."""
    if unknown := sorted(set(given) - set(stage.inputs)):
        raise UsageError(f"stage `{stage.name}` has no input `{unknown[0]}`", hint=f"it has: {', '.join(stage.inputs)}")
    for port, declared in stage.inputs.items():
        if port in given:
            value = given[port]
            bound = [_input(stage, port, item, base, directory) for item in listed(value)]
            yield port, bound if isinstance(value, list) else bound[0]
        elif not declared.optional:
            makeable = next((type for type in declared.types if type in artifacts.MAKERS), declared.types[0])
            yield port, _input(stage, port, makeable, base, directory)


def listed(value: Any) -> list[Any]:
    """What is bound to a port as a list: one artifact or several."""
    return list(value) if isinstance(value, list) else [value]


def _input(stage: Stage, port: str, value: Any, base: Path, directory: Path) -> Artifact:
    if isinstance(value, Artifact):
        return value
    declared = stage.inputs[port].types
    if value in artifacts.MAKERS or value in declared:
        place = directory / str(value)
        if place.is_dir():
            return Artifact(place, value, "", types.check(value, place))
        return artifacts.make(value, place)
    path = (base / str(value)).absolute()
    if not path.exists():
        raise UsageError(f"stage `{stage.name}`, input `{port}`: {path} does not exist")
    type = types.guess(path)
    return Artifact(path, type if type in declared else declared[0], "", {})
