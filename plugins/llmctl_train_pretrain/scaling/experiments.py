"""Runs from llmctl's own trainings: the metrics that `train-pretrain` left in the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.store import Store
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.names import every, read_json
from llmctl_train_pretrain.params import PretrainParams
from llmctl_train_pretrain.scaling.runs import Run, Runs, checked

METRICS = {
    "total": "parameters",
    "without-embedding": "parameters.without_embedding",
    "with-head": "parameters.with_head",
}
"""Way of counting → the metric of `train-pretrain` that holds it."""
LOSS = "loss.validation"
LEAST_POINTS = 3
"""Points that make a curve."""


def read_experiments(store: Store, texts: tuple[str, ...], count: str) -> Runs:
    """The trainings that `texts` name: PIPELINE/STAGE with all its instances, one instance, an id or a path.

    InputError for one that is no finished training, or was measured without validation.
    """
    found = {artifact.id or str(artifact.path): (name, artifact) for name, artifact in _artifacts(store, texts)}
    _comparable(found)
    rows, notes = [], _same_data(found)
    curves = {metric: [_curve(artifact, metric) for _, artifact in found.values()] for metric in (LOSS, "loss")}
    # Of one kind for all: curves of the training loss and of the validation loss are not comparable.
    metric = next((name for name, steps in curves.items() if all(len(one) >= LEAST_POINTS for one in steps)), "")
    chosen: Sequence[Sequence[tuple[int, float]]] = curves.get(metric, [()] * len(found))
    for (name, artifact), curve in zip(found.values(), chosen, strict=True):
        run, note = _run(name, artifact, count, curve)
        rows.append(run)
        notes += note
    if metric == "loss":
        notes.append("curves are of the training loss: set eval_every to have curves of the validation loss")
    return checked(rows, count, notes=tuple(dict.fromkeys(notes)))


def _comparable(found: dict[str, tuple[str, Artifact]]) -> None:
    """InputError for trainings of different objectives: their losses measure different things."""
    objectives = {str(read_json(one / "metrics.json").get("objective", "")): name for name, one in found.values()}
    if len(objectives) > 1:
        shown = ", ".join(f"{objective or 'none named'} ({name})" for objective, name in objectives.items())
        raise InputError(f"the runs have different objectives: {shown}", hint="fit those of one objective")


def _same_data(found: dict[str, tuple[str, Artifact]]) -> list[str]:
    """A note if the trainings did not all read the same tokens."""
    read = {json.dumps(_provenance(one).get("inputs", {}).get("tokens")) for _, one in found.values()}
    return ["the runs were trained on different tokens: their losses may not be comparable"] if len(read) > 1 else []


def _provenance(artifact: Artifact) -> Mapping[str, Any]:
    """How the artifact was made; empty for one from elsewhere."""
    try:
        return Manifest.read(artifact.path).provenance
    except (OSError, BadManifest):
        return {}


def _artifacts(store: Store, texts: tuple[str, ...]) -> Iterator[tuple[str, Artifact]]:
    refs = every(store)
    for text in texts:
        pipeline, _, stage = text.partition("/")
        wanted = stage.removesuffix("[*]")
        ids = {
            str(ref["stage"]): str(ref["id"])
            for name, ref in refs.items()
            if name.startswith(f"{pipeline}/")
            and "@" not in name.rpartition("]")[2]
            and ref.get("type") == "metrics"
            and str(ref.get("stage", "")).partition("[")[0] == wanted
        }
        if not ids or Path(text).exists():
            yield text, store.resolve(text, ("metrics",))
        for instance, id in ids.items():
            yield f"{pipeline}/{instance}", store.get(id)


def _run(name: str, artifact: Artifact, count: str, curve: Sequence[tuple[int, float]]) -> tuple[Run, list[str]]:
    """The run of a metrics artifact, and what a reader should know about it."""
    metrics = read_json(artifact / "metrics.json")
    wanted = {"parameters": METRICS[count], "tokens": "tokens", "steps": "steps", "loss": LOSS}
    missing = [metric for metric in wanted.values() if not isinstance(metrics.get(metric), int | float)]
    if missing:
        raise InputError(
            f"{name} reports no number `{missing[0]}`",
            hint="a finished train-pretrain with a validation split reports it; older results: run the stage again",
        )
    n, tokens, steps, loss = (float(metrics[metric]) for metric in wanted.values())
    points = [(step * tokens / steps, value) for step, value in curve]
    notes = []
    if points and _schedule(artifact) != "constant":
        notes.append("the rate had not decayed before the end of each curve: approach 1 sees losses that are too high")
    if (epochs := float(metrics.get("epochs", 0))) > 1:
        notes.append(f"{name} saw its data {epochs:.2g} times: repeated tokens teach less than new ones")
    return Run(name, n, tokens, loss, 6 * n * tokens, tuple(points)), notes


def _curve(artifact: Artifact, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric along the training."""
    path = artifact / "curves.jsonl"
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["step"], float(row[metric])) for row in rows if metric in row]


def _schedule(artifact: Artifact) -> str:
    """The schedule of the training; the default one is not kept with it."""
    given = _provenance(artifact).get("with") or {}
    return str(given.get("schedule", PretrainParams.model_fields["schedule"].default))
