"""The report of a run: one HTML file without any external resource, for a reader who has seen nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.console import human_bytes, human_number, human_seconds
from llmctl.pipeline import charts
from llmctl.pipeline.exports import export_directory
from llmctl.pipeline.result import RunResult, StageResult
from llmctl.spec.resolved import Pipeline, StageRef
from llmctl.stage import Artifact
from llmctl.store.external import list_files
from llmctl.store.names import timestamp

MOST_SAMPLES = 6
LONGEST_TEXT = 600
VARIANT_METRICS = {
    "exact_match.value": "exact match",
    "ranking.value": "right over wrong",
    "bits_per_byte": "bits per byte",
    "perplexity.bits_per_byte": "bits per byte",
    "decode.tokens_per_s": "tokens/s",
    "parity.max_abs_diff": "logits difference",
}
"""Columns of the table of models, as far as anything reports them: metric → heading."""


@dataclass
class Variant:
    """One model of the run: what it is, how large, and what was measured on it."""

    stage: str
    type: str
    bytes: int
    parameters: int | None
    numbers: dict[str, Any] = field(default_factory=dict)


def write_report(pipeline: Pipeline, result: RunResult) -> Path:
    """Write the report of a run and return its path.

    That of a run of all stages lies beside the exported results, `<output's parent>/<pipeline>-report.html`; that of a
    part of them, or of a pipeline that exports nothing, in the run's directory.
    """
    whole = all(id in result.stages for id, spec in pipeline.stages.items() if not spec.stage.effect)
    exported = [path.parent for spec in pipeline.stages.values() if (path := export_directory(spec))]
    beside = next((path for path in exported if path.is_dir() and whole and not pipeline.single), None)
    path = beside / f"{pipeline.name}-report.html" if beside else result.directory / "report.html"
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(render(pipeline, result), encoding="utf-8")
    fresh.replace(path)
    return path


def render(pipeline: Pipeline, result: RunResult) -> str:
    """The page."""
    variants = list(_variants(pipeline, result))
    gates = [gate for stage in result.stages.values() for gate in stage.gates]
    return fill_page(
        Path(__file__).with_name("report.html"),
        pipeline=pipeline,
        result=result,
        written=timestamp(),
        specs=pipeline.stages,
        gates=gates,
        passed=sum(gate.ok for gate in gates),
        curves=list(_curves(result)),
        variants=variants,
        columns=_columns(variants),
        largest=max((variant.bytes for variant in variants), default=1),
        samples=list(_samples(result)),
        graph=_graph(pipeline, result),
    )


def fill_page(template: Path, **values: Any) -> str:
    """A page from its template, which may extend `base.html`: the head and the style that llmctl's pages share."""
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": human_bytes, "seconds": human_seconds, "number": human_number}
    return environment.get_template(template.name).render(**values)


# -- numbers ----------------------------------------------------------------------------------------------------------


def read_rows(stage: StageResult, name: str) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file of a stage's `metrics` output."""
    for artifact in stage.outputs.values():
        path = artifact / name
        if artifact.type == "metrics" and path.is_file():
            rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
            return [row for row in rows if isinstance(row, dict)]
    return []


def _curves(result: RunResult) -> Iterable[tuple[str, str]]:
    """(stage, chart) of every stage that left a curve of its loss."""
    for stage in result.stages.values():
        series: dict[str, list[tuple[float, float]]] = {}
        for row in read_rows(stage, "curves.jsonl"):
            for name, value in row.items():
                if name.split(".")[0] == "loss" and isinstance(value, int | float):
                    series.setdefault(_series_name(name), []).append((row.get("step", 0), value))
        if chart := charts.line_chart(f"loss of {stage.id}", series):
            yield stage.id, chart


def _series_name(metric: str) -> str:
    return "train" if metric == "loss" else metric.removeprefix("loss.")


def _variants(pipeline: Pipeline, result: RunResult) -> Iterable[Variant]:
    """Every model that the run made, with the numbers that its own stage and evaluations of it report."""
    for stage in result.stages.values():
        for artifact in stage.outputs.values():
            if artifact.type.startswith("model."):
                numbers = {**_measured_on(pipeline, result, stage.id), **stage.metrics}
                parameters = stage.metrics.get("parameters", artifact.metadata.get("parameters"))
                yield Variant(stage.id, artifact.type, _size(artifact), parameters, numbers)


def _size(artifact: Artifact) -> int:
    return sum(path.stat().st_size for path in list_files(artifact.path).values())


def _measured_on(pipeline: Pipeline, result: RunResult, stage: str) -> dict[str, Any]:
    """Numbers of stages that make no model themselves and take `stage` as their `model`."""
    found: dict[str, Any] = {}
    for other in result.stages.values():
        refs = pipeline.stages[other.id].inputs.get("model", ())
        on_it = any(isinstance(ref, StageRef) and ref.stage == stage for ref in refs)
        if on_it and not any(artifact.type.startswith("model.") for artifact in other.outputs.values()):
            found |= other.metrics
    return found


def _columns(variants: list[Variant]) -> dict[str, list[str]]:
    """Heading → metrics that stand under it, for those that any model has."""
    columns: dict[str, list[str]] = {}
    for metric, heading in VARIANT_METRICS.items():
        if any(metric in variant.numbers for variant in variants):
            columns.setdefault(heading, []).append(metric)
    return columns


def _samples(result: RunResult) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """(stage, samples) of every stage that left samples: right and wrong ones, in their order."""
    for stage in result.stages.values():
        rows = [row for row in read_rows(stage, "samples.jsonl") if row.get("question") and "answer" in row]
        right = [row for row in rows if row.get("ok")][: MOST_SAMPLES - 2]
        wrong = [row for row in rows if not row.get("ok")][: MOST_SAMPLES - len(right)]
        chosen = [row for row in rows if row in right or row in wrong][:MOST_SAMPLES]
        if chosen:
            yield (
                stage.id,
                [{name: _cut(row.get(name)) for name in ("question", "answer", "expected", "ok")} for row in chosen],
            )


def _cut(value: Any) -> Any:
    """A text of readable length."""
    if isinstance(value, list):
        value = " · ".join(map(str, value))
    return value[:LONGEST_TEXT] + "…" if isinstance(value, str) and len(value) > LONGEST_TEXT else value


def _graph(pipeline: Pipeline, result: RunResult) -> str:
    """The stages of the run and what each was made from."""
    edges: Mapping[str, list[str]] = {
        id: list(
            dict.fromkeys(
                ref.stage
                for refs in pipeline.stages[id].inputs.values()
                for ref in refs
                if isinstance(ref, StageRef) and ref.stage in result.stages
            )
        )
        for id in result.stages
    }
    labels, kinds = {}, {}
    for id, stage in result.stages.items():
        missed = any(not gate.ok for gate in stage.gates)
        kinds[id] = "bad" if missed or stage.status == "failed" else stage.status
        first = next(iter(stage.headline.items()), None)
        labels[id] = f"{first[0]} {human_number(first[1])}"[:34] if first else pipeline.stages[id].stage.name
    return charts.graph(edges, labels, kinds)
