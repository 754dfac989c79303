"""`select`: the row of a matrix that wins. Nothing runs, nothing is copied: its outputs are the winner's artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.console import human_number
from llmctl.errors import StageError
from llmctl.pipeline.gates import available, number, read_metrics
from llmctl.spec.resolved import Pipeline, Ref, StageRef, StageSpec
from llmctl.stage import Artifact


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The winning row of `rows`, counted from 0, and the number that it won by."""

    row: int
    rows: int
    stage: str
    """The instance that made what was chosen, e.g. `sft[lr=3e-5,seed=2]`."""
    values: Mapping[str, Any]
    """Its values of the matrix."""
    metric: str
    mode: str
    value: float
    outputs: Mapping[str, Artifact]

    def __str__(self) -> str:
        word = {"max": "largest", "min": "least"}[self.mode]
        return f"{self.stage}: {self.metric} {human_number(self.value)} is the {word} of {self.rows}"

    def to_json(self) -> dict[str, Any]:
        """The parts that `run.json` and the events keep."""
        names = ("row", "rows", "stage", "metric", "mode", "value")
        return {**{name: getattr(self, name) for name in names}, "values": dict(self.values)}


def choose(spec: StageSpec, bound: Mapping[str, Sequence[Artifact]], pipeline: Pipeline) -> Choice:
    """The row whose metric is least or largest, the first of equals. StageError names a row without the metric."""
    select = spec.select
    if select is None:
        raise TypeError(f"`{spec.id}` chooses nothing")
    lengths = {port: len(artifacts) for port, artifacts in bound.items()}
    if len(set(lengths.values())) != 1:
        shown = ", ".join(f"{port} {count}" for port, count in lengths.items())
        raise StageError(f"the lists differ in length: {shown}", hint="each needs one entry per row")
    found = [
        _value(artifact, ref, select.metric)
        for artifact, ref in zip(bound[select.port], spec.inputs[select.port], strict=True)
    ]
    best = (max if select.mode == "max" else min)(found)
    row = found.index(best)
    made = next((port for port in spec.inputs if port != select.port), select.port)
    stage = _name(spec.inputs[made][row])
    return Choice(
        row=row,
        rows=len(found),
        stage=stage,
        values=pipeline.stages[stage].row if stage in pipeline.stages else {},
        metric=select.metric,
        mode=select.mode,
        value=best,
        outputs={port: artifacts[row] for port, artifacts in bound.items()},
    )


def _value(artifact: Artifact, ref: Ref, metric: str) -> float:
    metrics = read_metrics({"metrics": artifact})
    value = number(metrics.get(metric))
    if value is None:
        raise StageError(
            f"`{_name(ref)}` reports no number `{metric}`; {available(metrics)}", hint="every row needs one to compare"
        )
    return value


def _name(ref: Ref) -> str:
    return ref.stage if isinstance(ref, StageRef) else str(ref)
