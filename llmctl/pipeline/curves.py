"""`llmctl curves`: loss, rate, gradient norm and speed of trainings as one HTML page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.store.commands import store_option

if TYPE_CHECKING:
    from llmctl.store import Store

CHARTS = {
    "loss": "Training loss",
    "loss.validation": "Validation loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
}
"""What is drawn, in order: metric → heading."""


@dataclass
class Curves:
    """The points of one training, by metric."""

    name: str
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, metric: str, step: Any, value: Any) -> None:
        """A point; what is no number is left out."""
        numbers = isinstance(step, int | float) and isinstance(value, int | float) and not isinstance(value, bool)
        if metric in CHARTS and numbers:
            self.points.setdefault(metric, []).append((step, value))

    @property
    def steps(self) -> int:
        """Of the last point."""
        return int(max((points[-1][0] for points in self.points.values()), default=0))

    @property
    def last(self) -> dict[str, float]:
        """The last value of each metric."""
        return {metric: points[-1][1] for metric, points in self.points.items()}


@click.command()
@click.argument("trainings", nargs=-1)
@click.option(
    "--html",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    default="curves.html",
    show_default=True,
    help="The page.",
)
@store_option
def curves(trainings: tuple[str, ...], target: Path, store_path: Path | None) -> None:
    """Draw the curves of TRAININGS: results (quickstart/train), run ids, or nothing for the latest run.

    Several share each chart. A run may still be going on, or have failed.
    """
    from llmctl.errors import InputError
    from llmctl.store import Store

    store = Store.open(store_path)
    found = [run for text in trainings or (latest(store),) for run in read(store, text)]
    if not found:
        raise InputError("there are no curves in what was given", hint="curves are left by stages that train")
    fresh = target.with_name(f".{target.name}.new")
    fresh.write_text(render(found), encoding="utf-8")
    fresh.replace(target)
    for run in found:
        click.echo(
            f"{run.name}: {run.steps} steps, {', '.join(CHARTS[name].lower() for name in CHARTS if name in run.points)}"
        )
    click.echo(f"curves: {target}")


def latest(store: Store) -> str:
    """The id of the newest run; InputError if there is none."""
    from llmctl.errors import InputError

    runs = sorted(path.parent.name for path in store.run("x").parent.glob("*/metrics.jsonl"))
    if not runs:
        raise InputError("nothing has run in this store", hint="name a training: llmctl curves quickstart/train")
    return runs[-1]


def read(store: Store, text: str) -> list[Curves]:
    """The trainings that `text` means: all of a run, or that which left an artifact; InputError if there is no such."""
    log = store.run(text).joinpath("metrics.jsonl") if "/" not in text else Path()
    if log.is_file():
        return [run for run in of_a_run(log, text) if "loss" in run.points]
    artifact = store.resolve(text, ("metrics",))
    return [of_rows(text, _rows(artifact / "curves.jsonl"))]


def of_a_run(log: Path, run: str) -> list[Curves]:
    """One per stage of a run that has reported anything."""
    found: dict[str, Curves] = {}
    for row in _rows(log):
        stage = str(row.get("stage", ""))
        found.setdefault(stage, Curves(f"{stage} of {run}")).add(
            str(row.get("name")), row.get("step"), row.get("value")
        )
    return list(found.values())


def of_rows(name: str, rows: Iterator[Mapping[str, Any]]) -> Curves:
    """Of the rows of `curves.jsonl`."""
    found = Curves(name)
    for row in rows:
        for metric, value in row.items():
            found.add(metric, row.get("step"), value)
    return found


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON Lines file; the last line of a run that goes on may be half written."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def render(runs: Sequence[Curves]) -> str:
    """The page."""
    from llmctl.pipeline.charts import line_chart
    from llmctl.pipeline.report import fill_page
    from llmctl.store.names import timestamp

    drawn = {title: {run.name: run.points.get(metric, []) for run in runs} for metric, title in CHARTS.items()}
    charts = [(title, chart) for title, series in drawn.items() if (chart := line_chart(title, series))]
    columns = {title: metric for metric, title in CHARTS.items() if any(metric in run.points for run in runs)}
    template = Path(__file__).with_name("curves.html")
    return fill_page(template, runs=runs, charts=charts, columns=columns, written=timestamp())
