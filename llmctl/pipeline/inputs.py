"""From the references of a spec to artifacts: outputs of stages, declared sources, paths, globs, ids, names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.errors import InputError
from llmctl.spec.hub_address import is_hub, parse_hub
from llmctl.spec.resolved import IdRef, NameRef, PathRef, Pipeline, Ref, SourceRef, StageRef, StageSpec
from llmctl.stage import Artifact, In
from llmctl.store import Store
from llmctl.store.external import External, Snapshot, expand, read_external

if TYPE_CHECKING:
    from llmctl.store.hub import HubInput

Outputs = Mapping[str, Mapping[str, Artifact]]
"""Stage id → output port → artifact, for the stages that are done."""


ONE = "a pinned source is one file or one directory"


class Inputs:
    """Binds the inputs of a pipeline's stages; files outside the store are read once."""

    def __init__(self, pipeline: Pipeline, store: Store) -> None:
        self._pipeline = pipeline
        self._store = store
        self._external: dict[tuple[Path, tuple[str, ...], str, str], External] = {}
        self._hub: dict[tuple[str, tuple[str, ...], str], HubInput] = {}

    def check_paths(self, specs: Sequence[StageSpec]) -> None:
        """Raise InputError for the first path that does not exist or glob that matches nothing; reads no contents, and
        asks no hub."""
        for ref in (ref for spec in specs for refs in spec.inputs.values() for ref in refs):
            if isinstance(ref, PathRef | SourceRef) and not is_hub(self._uri(ref)):
                self._paths(ref)

    def check(self, specs: Sequence[StageSpec]) -> None:
        """Read everything that no stage makes; the first that is damaged or of a wrong kind is an InputError."""
        for spec in specs:
            for port, refs in spec.inputs.items():
                list(self._given(spec.stage.inputs[port], refs))

    def bind(self, spec: StageSpec, outputs: Outputs) -> dict[str, list[Artifact]] | None:
        """The artifacts of every bound port, or None while a stage that makes one of them has not run."""
        bound: dict[str, list[Artifact]] = {}
        for port in spec.inputs:
            artifacts = self.port(spec, port, outputs)
            if artifacts is None:
                return None
            bound[port] = artifacts
        return bound

    def port(self, spec: StageSpec, port: str, outputs: Outputs) -> list[Artifact] | None:
        """The artifacts of one port, or None while a stage that makes one of them has not run."""
        refs = spec.inputs[port]
        given = dict(self._given(spec.stage.inputs[port], refs))
        artifacts: list[Artifact] = []
        for ref in refs:
            if not isinstance(ref, StageRef):
                artifacts += given[ref]
            elif ref.stage in outputs:
                artifacts.append(outputs[ref.stage][ref.port])
            else:
                return None
        return artifacts

    def outside(self, specs: Sequence[StageSpec]) -> dict[PathRef | SourceRef, list[Artifact]]:
        """Every path and source that these stages read, with what is there now; raises what `check` raises."""
        return {
            ref: artifacts
            for spec in specs
            for port, refs in spec.inputs.items()
            for ref, artifacts in self._given(spec.stage.inputs[port], refs)
            if isinstance(ref, PathRef | SourceRef)
        }

    def snapshots(self, bound: Mapping[str, Sequence[Artifact]]) -> list[Snapshot]:
        """How the external files among these inputs looked when they were read."""
        paths = {artifact.path for artifacts in bound.values() for artifact in artifacts}
        read = [*self._external.values(), *(found.external for found in self._hub.values())]
        found = {item.artifact.path: item.snapshot for item in read}
        return [snapshot for path, snapshot in found.items() if path in paths]

    def revision(self, ref: PathRef | SourceRef) -> str:
        """The commit that a reference to the hub meant when it was read; empty for anything else."""
        return next((found.commit for key, found in self._hub.items() if key[0] == self._uri(ref)), "")

    def _given(self, port: In, refs: Sequence[Ref]) -> Iterator[tuple[Ref, list[Artifact]]]:
        """The artifacts of the references that do not point at stages."""
        outside = [ref for ref in refs if isinstance(ref, PathRef | SourceRef)]
        paths = {ref: self._paths(ref) for ref in outside if not is_hub(self._uri(ref))}
        names = _names([path for found in paths.values() for path in found])
        for ref in refs:
            if isinstance(ref, PathRef | SourceRef):
                accepted = (ref.type,) if ref.type else port.types
                artifacts = [self._read(path, accepted, names.get(path, ""), ref) for path in paths.get(ref, ())]
                artifacts = artifacts or [self._fetch(ref, accepted)]
                if len(artifacts) > 1 and not port.many:
                    raise InputError(f"`{ref}` matches {len(artifacts)} files, the input takes one{_at(ref)}")
                self._check_digest(ref, artifacts)
                yield ref, artifacts
            elif isinstance(ref, IdRef | NameRef):
                yield ref, [self._stored(port, ref)]
            elif not isinstance(ref, StageRef):
                raise InputError("an input was to come from stdin, and nothing did", hint="pipe a stage into this one")

    def _check_digest(self, ref: Ref, artifacts: Sequence[Artifact]) -> None:
        """InputError if a source is not what its `digest` says; one that is pinned is what it says by definition."""
        source = self._pipeline.sources[ref.name] if isinstance(ref, SourceRef) else None
        if source is None or not source.digest:
            return
        if source.identity == "pinned" and len(artifacts) > 1:
            raise InputError(
                f"`{ref}` is pinned and matches {len(artifacts)} files{_at(ref, self._pipeline)}", hint=ONE
            )
        if (found := outside_id(artifacts)) != source.digest:
            raise InputError(
                f"`{ref}` has changed: its content id is {found}, the spec wants {source.digest}"
                f"{_at(ref, self._pipeline)}",
                hint="look at what changed; if that is meant, write the new `digest`",
            )

    def _uri(self, ref: PathRef | SourceRef) -> str:
        return ref.uri if isinstance(ref, PathRef) else self._pipeline.sources[ref.name].uri

    def _paths(self, ref: PathRef | SourceRef) -> list[Path]:
        uri = self._uri(ref)
        # A shipped spec acts as if it lay in `./specs`, which need not exist.
        path = Path(os.path.normpath(self._pipeline.resolve(uri)))
        found = expand(path)
        if not found:
            is_glob = any(sign in uri for sign in "*?[")
            what = "nothing matches" if is_glob else "no such file or directory:"
            raise InputError(
                f"{what} {uri}{_at(ref, self._pipeline)}", hint=f"looked for {self._pipeline.resolve(uri)}"
            )
        return found

    def _read(self, path: Path, accepted: tuple[str, ...], name: str, ref: Ref) -> Artifact:
        inside = path.is_relative_to(self._store.root / "artifacts")
        if inside:
            return self._store.at(path, accepted)
        pinned = self._pinned(ref)
        key = (path, accepted, name, pinned)
        if key not in self._external:
            try:
                self._external[key] = read_external(self._store, path, accepted, name, pinned=pinned)
            except InputError as error:
                raise InputError(f"{error.message}{_at(ref, self._pipeline)}", hint=error.hint) from error
        return self._external[key].artifact

    def _fetch(self, ref: PathRef | SourceRef, accepted: tuple[str, ...]) -> Artifact:
        from llmctl.store.hub import read_hub

        key = (self._uri(ref), accepted, self._pinned(ref))
        if key not in self._hub:
            try:
                self._hub[key] = read_hub(self._store, parse_hub(key[0]), accepted, pinned=key[2])
            except InputError as error:
                raise InputError(f"{error.message}{_at(ref, self._pipeline)}", hint=error.hint) from error
        return self._hub[key].external.artifact

    def _pinned(self, ref: Ref) -> str:
        source = self._pipeline.sources[ref.name] if isinstance(ref, SourceRef) else None
        return source.digest if source and source.identity == "pinned" else ""

    def _stored(self, port: In, ref: IdRef | NameRef) -> Artifact:
        if isinstance(ref, IdRef):
            return self._store.resolve(ref.id, port.types)
        name = ref.name if "/" in ref.name else f"{self._pipeline.name}/{ref.name}"
        return self._store.resolve(f"{name}@{ref.tag}", port.types)


def outside_id(artifacts: Sequence[Artifact]) -> str:
    """The content id of an input from outside: its artifact's, or the digest of those of a glob's files."""
    from llmctl.spec.canonical import digest

    return artifacts[0].id if len(artifacts) == 1 else digest([artifact.id for artifact in artifacts])


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """What single files are called in their content ids: relative to the directory they share.

    A file's name is part of its id, since readers choose by it and write it into their rows; where it lies is not.
    """
    files = [path for path in paths if path.is_file()]
    if not files:
        return {}
    common = Path(os.path.commonpath([path.parent for path in files]))
    return {path: path.relative_to(common).as_posix() for path in files}


def _at(ref: Ref, pipeline: Pipeline | None = None) -> str:
    """` (file:line:column)` of a reference, if it has one."""
    where = ref.where if isinstance(ref, PathRef) else ""
    if isinstance(ref, SourceRef) and pipeline is not None:
        where = pipeline.sources[ref.name].where
    return f" ({where})" if where else ""
