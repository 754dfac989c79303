"""From a spec file or a command line to a `Pipeline`: read, merge, interpolate, validate, wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmctl.spec.resolved import (
    EnvValue,
    Gate,
    IdRef,
    NameRef,
    PathRef,
    Pipeline,
    Ref,
    Resources,
    Source,
    SourceRef,
    StageRef,
    StageSpec,
    StdinRef,
)
from llmctl.stage import Stage

__all__ = [
    "EnvValue",
    "Gate",
    "IdRef",
    "NameRef",
    "PathRef",
    "Pipeline",
    "Ref",
    "Registry",
    "Resources",
    "Source",
    "SourceRef",
    "StageRef",
    "StageSpec",
    "StdinRef",
    "load_pipeline",
    "print_spec",
    "single_stage",
]


class Registry(Protocol):
    """What a spec needs to know of the installed plugins."""

    @property
    def stages(self) -> Mapping[str, Stage]:
        """Stages by name."""


def load_pipeline(
    path_or_name: str | Path, profiles: Sequence[str] = (), sets: Sequence[str] = (), *, registry: Registry
) -> Pipeline:
    """Read a spec: an existing file, or the name of a shipped spec.

    `sets` are `KEY=VALUE` texts. Raises `SpecError` (a `UsageError`) with every mistake found.
    """
    raise NotImplementedError


def single_stage(
    stage: Stage,
    *,
    file: Path | None = None,
    inputs: Sequence[str] = (),
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    output: str | None = None,
    stdin: bool = False,
    registry: Registry,
) -> Pipeline:
    """A pipeline of one stage from a stage command: `-c file` < flags < `--set`.

    `inputs` are `PORT=REF` texts. `flags` maps parameter names to values: a text is read like that of `--set`, None
    means not given. With `stdin` a required input may stay unbound (`StageSpec.unbound` names them), because a
    reference for it can still arrive on stdin. Raises `SpecError`.
    """
    raise NotImplementedError


def print_spec(pipeline: Pipeline) -> str:
    """The YAML text that gives the same pipeline when read from its `base` directory."""
    raise NotImplementedError
