"""From a spec file or a command line to a `Pipeline`: read, merge, interpolate, validate, wire.

pydantic and PyYAML are imported when a spec is read, not with this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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

if TYPE_CHECKING:
    from llmctl.registry import Origin
    from llmctl.spec.overrides import Setting

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

    def origin(self, stage_name: str, /) -> Origin:
        """The distribution of a stage; asked for only where a spec wants a version of it."""


def load_pipeline(
    path_or_name: str | Path, profiles: Sequence[str] = (), sets: Sequence[str | Setting] = (), *, registry: Registry
) -> Pipeline:
    """Read a spec: an existing file, or the name of a shipped spec, which then counts as lying in `./specs`.

    `profiles` are overlays in order, `sets` are settings or `KEY=VALUE` texts on top; relative paths in those start
    from the current directory. Raises `SpecError` (a `UsageError`) with every mistake found.
    """
    from llmctl.spec.reading import open_spec

    found, reading = open_spec(path_or_name, profiles, sets, registry)
    return reading.finish(found.path, found.base, tuple(profiles))


def single_stage(
    stage: Stage,
    *,
    file: Path | None = None,
    inputs: Sequence[str] = (),
    sets: Sequence[str | Setting] = (),
    flags: Mapping[str, Any] | None = None,
    output: str | None = None,
    stdin: bool = False,
    registry: Registry,
) -> Pipeline:
    """A pipeline of one stage from a stage command: `-c file` < flags < `--set`.

    `inputs` are `PORT=REF` texts; one that names a port of the file replaces what the file says. `flags` maps
    parameter names to values: a text is read like that of `--set`, None means not given. With `stdin` a required
    input may stay unbound (`StageSpec.unbound` names them), because a reference for it can still arrive on stdin.
    Raises `SpecError`.
    """
    from llmctl.spec.files import Found, find_file, read
    from llmctl.spec.includes import with_includes
    from llmctl.spec.reading import Reading, bare_stage

    found = find_file(file) if file else Found(path=None, base=Path.cwd(), name="")
    document = with_includes(read(found), found.path) if file else bare_stage(stage)
    reading = Reading(document, registry, single=stage)
    overrides = reading.overrides()
    overrides.inputs(inputs)
    overrides.flags(flags or {})
    if output is not None:
        overrides.text("output", "--output", output)
    overrides.set(sets)
    return reading.finish(found.path, found.base, (), stdin=stdin)


def print_spec(pipeline: Pipeline) -> str:
    """The YAML text that gives the same pipeline, one without rows, when it is read from a file in `pipeline.base`.

    Parameters that were not given stay out; profiles, variables and `--set` are worked in.
    """
    from llmctl.spec.printing import spec_text

    return spec_text(pipeline)
