"""`ephemeral: true`: outputs that are only a step on the way go to the trash as soon as nothing in the run needs them.

The key stays published: with the ids that it names, what depends on the stage is still found, and the stage is only run
again when something must read its bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmctl.pipeline.plan import sources
from llmctl.pipeline.result import StageResult
from llmctl.spec.resolved import Pipeline, StageSpec
from llmctl.store import Store, names
from llmctl.store.guard import taking
from llmctl.store.names import MAIN


class Collector:
    """Collects the outputs of one run's ephemeral stages. Metrics stay: they are small, and gates read them."""

    def __init__(self, pipeline: Pipeline, store: Store, specs: Sequence[StageSpec]) -> None:
        self._pipeline = pipeline
        self._store = store
        self._open: dict[str, set[str]] = {}
        """Ephemeral stage → the stages of the run that still have to read it; those nobody reads are left alone."""
        ephemeral = {spec.id: spec for spec in specs if spec.ephemeral and spec.output is None}
        self._specs = ephemeral
        for spec in specs if ephemeral else ():
            for stage in sources(spec):
                if stage in ephemeral:
                    self._open.setdefault(stage, set()).add(spec.id)

    def settled(self, spec: StageSpec, results: Mapping[str, StageResult]) -> list[str]:
        """A stage is done; returns the stages whose outputs were collected because it was their last reader."""
        collected = []
        for stage, readers in self._open.items():
            if spec.id in readers:
                readers.remove(spec.id)
                if not readers and self._collect(stage, results[stage]):
                    collected.append(stage)
        return collected

    def _collect(self, stage: str, result: StageResult) -> bool:
        """Move what only this result needs to the trash; whether anything was moved."""
        gone = []
        for port, artifact in result.outputs.items():
            if artifact.type == MAIN or not artifact.path.is_dir():
                continue
            seen = self._store.last_use(artifact.id)
            if not self._held(stage, artifact.id, result.key) and self._move(artifact.id, seen):
                gone.append(port)
        result.outputs = {port: artifact for port, artifact in result.outputs.items() if port not in gone}
        result.collected = result.collected or bool(gone)
        return bool(gone)

    def _held(self, stage: str, id: str, key: str) -> bool:
        """Whether a name other than the stage's own latest one, or the result of another key, is the same artifact."""
        own = f"{self._pipeline.name}/{stage}."
        for name, ref in names.every(self._store).items():
            if ref.get("id") == id and not (name.startswith(own) and "@" not in name):
                return True
        others = (path for path in (self._store.root / "keys").glob("*/*.json") if path != self._store.key(key))
        return any(_names_id(path, id) for path in others)

    def _move(self, id: str, seen: int) -> bool:
        """Move an artifact to the trash unless another run has found it since `seen`; whether it went."""
        directory = self._store.artifact(id)
        with taking(self._store), contextlib.suppress(FileNotFoundError):  # another run was faster
            if self._store.last_use(id) == seen:
                directory.rename(self._store.trash("artifact", directory.name))
                return True
        return False


def _names_id(path: Path, id: str) -> bool:
    """Whether a key's pointer has this id among its outputs; a damaged one is no result."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        text = path.read_text(encoding="utf-8")
        return id in text and id in json.loads(text)["outputs"].values()
    return False
