"""The two keys of a stage execution: what decides its result, and what decides the state it may resume from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmctl.registry import Origin
    from llmctl.spec.resolved import StageSpec
    from llmctl.stage import Stage

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Keys:
    """`action` and `resume` are `sha256:…`; `preimage` is what was hashed for `action`."""

    preimage: Mapping[str, Any]
    action: str
    resume: str


def make_keys(
    spec: StageSpec, origin: Origin, inputs: Mapping[str, Sequence[str]], strict: Mapping[str, str] | None = None
) -> Keys:
    """The keys of `spec` with these content ids per input port; the resume key leaves out how far to go.

    `strict` are facts of the machine that count, too (`--strict-env`).
    """
    from llmctl.spec.canonical import digest
    from llmctl.spec.extent import has_extent

    preimage = {
        **static_preimage(spec, origin, strict),
        "inputs": {port: list(ids) for port, ids in sorted(inputs.items())},
    }
    resume = {**preimage, "resume": True}
    if has_extent(type(spec.params)):
        resume["with"] = spec.key_params(extent=False)
    return Keys(preimage=preimage, action=digest(preimage), resume=digest(resume))


def static_preimage(spec: StageSpec, origin: Origin, strict: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The part of the pre-image that is known before any input is."""
    plugin = {"dist": origin.dist, "rev": spec.stage.rev}
    if origin.source_digest:
        plugin["src"] = origin.source_digest
    return {
        "v": VERSION,
        "stage": spec.stage.name,
        "plugin": plugin,
        "with": spec.key_params(),
        "env": {name: item.value for name, item in sorted(spec.env.items()) if item.affects_output and not item.secret},
        "key_deps": key_deps(spec.stage),
        **({"machine": dict(strict)} if strict else {}),
    }


def key_deps(stage: Stage) -> dict[str, str]:
    """The version of each declared dependency: major.minor of a distribution, the full one of `python`.

    Python's own is full because its standard library, which `data` reads, differs between patch releases.
    """
    return {name: _version(name) for name in sorted(stage.key_deps)}


def _version(name: str) -> str:
    if name == "python":
        import platform

        return platform.python_version()
    try:
        return ".".join(metadata.version(name).split(".")[:2])
    except metadata.PackageNotFoundError:
        return "not installed"
