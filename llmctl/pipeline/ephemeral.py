"""`ephemeral: true`: outputs that are only a step on the way go to the trash as soon as nothing in the run needs them.

The key stays published: with the ids that it names, what depends on the stage is still found, and the stage is only run
again when something must read its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmctl.pipeline.plan import sources
from llmctl.pipeline.result import StageResult
from llmctl.spec.resolved import Pipeline, StageSpec
from llmctl.store import Store
from llmctl.store.collection import release
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
            if release(self._store, artifact.id, seen, stage=f"{self._pipeline.name}/{stage}", key=result.key):
                gone.append(port)
        result.outputs = {port: artifact for port, artifact in result.outputs.items() if port not in gone}
        result.collected = result.collected or bool(gone)
        return bool(gone)
