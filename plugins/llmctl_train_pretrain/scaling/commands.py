"""`llmctl scaling`: fit laws to runs, plan from a law, list the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.errors import InputError, UsageError
from llmctl.store.commands import format_option, store_option

if TYPE_CHECKING:
    from llmctl_train_pretrain.scaling.published import Coefficients
    from llmctl_train_pretrain.scaling.runs import Runs

CHINCHILLA = 5.76e23
"""Gopher's and Chinchilla's budget."""
POSITIVE = click.FloatRange(0, min_open=True)
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


class Count(click.ParamType):  # type: ignore[type-arg]  # generic in click's stubs only
    """A positive number that may end in k, M, B or T: `7B`, `1.4T`, `2e10`."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        if isinstance(value, int | float):
            return float(value)
        text = str(value).strip()
        unit = UNITS.get(text[-1:].lower(), 0)
        try:
            number = float(text[:-1]) * unit if unit else float(text)
        except ValueError:
            self.fail(f"{value!r} is no number such as 7B or 2e10", param, ctx)
        if not 0 < number < float("inf"):
            self.fail(f"{value!r} is not positive", param, ctx)
        return number


COUNT = Count()


@click.group()
def scaling() -> None:
    """Scaling laws: how large a model, on how many tokens, for a budget."""


@scaling.command()
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--count",
    type=click.Choice(["total", "without-embedding", "with-head"]),
    default="total",
    show_default=True,
    help="Which parameters N counts, of trainings in the store.",
)
@click.option("--column", multiple=True, help="ROLE=NAME: a table's column; parameters, tokens, loss, flops or run.")
@click.option(
    "--approach",
    "approaches",
    multiple=True,
    type=click.Choice(["1", "2", "3", "kaplan"]),
    help="What to fit; may be given several times. Default: all.",
)
@click.option("--drop-highest", type=click.IntRange(0), default=0, help="Drop losses at or above this many highest.")
@click.option("--max-loss", type=POSITIVE, help="Drop runs with a larger loss.")
@click.option(
    "--budget-tolerance",
    type=POSITIVE,
    default=0.1,
    show_default=True,
    help="Approach 2: budgets this share apart are one.",
)
@click.option("--resamples", type=click.IntRange(0), default=1000, show_default=True, help="Bootstrap resamples.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resamples.")
@click.option(
    "--level",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Share of resamples inside an interval.",
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots to this file.")
@store_option
@format_option
def fit(
    runs: tuple[str, ...],
    count: str,
    column: tuple[str, ...],
    approaches: tuple[str, ...],
    drop_highest: int,
    max_loss: float | None,
    html: Path | None,
    store_path: Path | None,
    format_: str,
    budget_tolerance: float,
    **given: Any,
) -> None:
    """Fit scaling laws to RUNS: a table (.csv, .jsonl, .parquet), or trainings as PIPELINE/STAGE.

    PIPELINE/STAGE takes all instances of a sweep. A table has a row per run with parameters, loss, and tokens or flops;
    several rows of one run are its curve. `--format json > fit.json` is what `plan --coefficients fit.json` reads.
    """
    from llmctl_train_pretrain.scaling.fitting import APPROACHES, Settings
    from llmctl_train_pretrain.scaling.fitting import fit as fit_all
    from llmctl_train_pretrain.scaling.listing import report_text

    found = read_runs(runs, count, column, store_path).without_outliers(drop_highest, max_loss)
    settings = Settings(approaches=approaches or APPROACHES, tolerance=budget_tolerance, **given)
    report = fit_all(found, settings)
    if not report.fits:
        reasons = "; ".join(f"{name}: {why}" for name, why in report.refused.items())
        raise InputError(f"no law can be fitted to these {len(found)} runs. {reasons}")
    if html is not None:
        from llmctl_train_pretrain.scaling.page import render

        html.write_text(render(report), encoding="utf-8")
    _print(format_, report.to_json(), lambda: report_text(report))


def read_runs(texts: tuple[str, ...], count: str, column: tuple[str, ...], store_path: Path | None) -> Runs:
    """One table, or trainings in the store; UsageError for a mixture."""
    from llmctl.store import Store
    from llmctl_train_pretrain.scaling.experiments import read_experiments
    from llmctl_train_pretrain.scaling.tables import SUFFIXES, parse_columns, read_table

    columns = parse_columns(column)
    tables = [text for text in texts if text.endswith(SUFFIXES)]
    if tables and len(texts) > 1:
        raise UsageError("one table, or trainings in the store, not several", hint="put all runs into one table")
    if tables:
        if count != "total":
            raise UsageError(
                "--count is about trainings in the store; a table's N is its column",
                hint="--column parameters=NAME chooses another column",
            )
        return read_table(Path(tables[0]), columns)
    if columns:
        raise UsageError("--column is about a table", hint=f"give a file: {', '.join(SUFFIXES)}")
    return read_experiments(Store.open(store_path), texts, count)


def _print(format_: str, value: Any, text: Callable[[], str]) -> None:
    from llmctl.store.commands import print_as

    print_as(format_, value, text)


@scaling.command()
@click.option("--flops", type=COUNT, help="The budget in operations.")
@click.option("--hours", type=POSITIVE, help="The budget in hours of --devices; needs a speed.")
@click.option("--devices", type=click.IntRange(1), default=1, show_default=True, help="How many devices --hours has.")
@click.option("--flops-per-second", type=COUNT, help="Speed of a device: operations per second.")
@click.option("--gpu", help="Speed of a device: a card whose bf16 peak is known.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Share of the card's peak. Default: 0.4.")
@click.option("--tokens-per-second", type=COUNT, help="Speed of a device: tokens per second of a model.")
@click.option("--of-parameters", type=COUNT, help="Parameters of the model of --tokens-per-second.")
@click.option("--measured", help="Speed of a device: that of this training, PIPELINE/STAGE.")
@click.option("--parameters", type=COUNT, help="Fix the size.")
@click.option("--tokens", type=COUNT, help="Fix the number of tokens.")
@click.option(
    "--coefficients",
    default="besiroglu",
    show_default=True,
    help="A published law (`llmctl scaling coefficients`), or FILE[:APPROACH] of `fit --format json`.",
)
@click.option("--family", default="llama", show_default=True, help="Family of the shape that is proposed.")
@click.option("--vocab-size", type=click.IntRange(2), default=32768, show_default=True, help="Of that shape.")
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, help="Of that shape.")
@click.option("--width-over-depth", type=POSITIVE, help="Of that shape. Default: the usual one of its size.")
@store_option
@format_option
def plan(
    flops: float | None,
    hours: float | None,
    devices: int,
    parameters: float | None,
    tokens: float | None,
    coefficients: str,
    family: str,
    vocab_size: int,
    context: int,
    width_over_depth: float | None,
    store_path: Path | None,
    format_: str,
    **speed: Any,
) -> None:
    """Say how large a model to train and on how many tokens.

    From a budget, a size, or a number of tokens the rest follows. Two of them fix a training away from the optimum,
    such as a smaller model trained for longer; the plan says what that costs.
    """
    from dataclasses import replace

    from llmctl_train_pretrain.scaling.listing import plan_text
    from llmctl_train_pretrain.scaling.planning import make_plan
    from llmctl_train_pretrain.scaling.shapes import nearest_preset, nearest_shape

    law = find_coefficients(coefficients)
    budget, text = _budget(flops, hours, devices, speed, store_path)
    found = make_plan(law, flops=budget, parameters=parameters, tokens=tokens, budget=text)
    counts = law.counts if law.counts in ("total", "without-embedding", "with-head") else "total"
    wanted = found.trained.parameters
    found = replace(
        found,
        shape=nearest_shape(
            wanted, family=family, vocab_size=vocab_size, context=context, counts=counts, aspect=width_over_depth
        ),
        preset=nearest_preset(wanted, vocab_size=vocab_size, counts=counts),
    )
    _print(format_, found.to_json(), lambda: plan_text(found))


def _budget(
    flops: float | None, hours: float | None, devices: int, speed: dict[str, Any], store_path: Path | None
) -> tuple[float | None, str]:
    """(operations, in words); (None, "") if no budget is given."""
    from llmctl.store import Store
    from llmctl.train.throughput import PEAKS
    from llmctl_train_pretrain.scaling.budgets import Speed, in_hours

    if speed["gpu"] is not None and speed["gpu"] not in PEAKS:
        raise UsageError(f"the peak of {speed['gpu']!r} is not known", hint=f"one of {', '.join(PEAKS)}")
    if flops is not None and hours is not None:
        raise UsageError("--flops and --hours are both a budget", hint="give one")
    if hours is None:
        if idle := [name for name, value in speed.items() if value is not None] + ["devices"] * (devices != 1):
            raise UsageError(f"--{idle[0].replace('_', '-')} has no effect without --hours")
        return flops, "" if flops is None else f"{flops:.3g} operations"
    found = in_hours(hours, devices, Speed(**speed), Store.open(store_path))
    return found.flops, f"{found.flops:.3g} operations: {found.text}"


def find_coefficients(text: str) -> Coefficients:
    """A published law, or one of a file that `fit --format json` wrote. UsageError or InputError."""
    from llmctl_train_pretrain.scaling.published import PUBLISHED

    if text in PUBLISHED:
        return PUBLISHED[text]
    name, _, approach = text.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"no coefficients {text!r}", hint=f"one of {', '.join(PUBLISHED)}, or a file of `scaling fit --format json`"
        )
    return _of_a_fit(path, approach)


def _of_a_fit(path: Path, approach: str) -> Coefficients:
    from llmctl_train_pretrain.scaling.laws import from_json
    from llmctl_train_pretrain.scaling.published import Coefficients

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        approaches = value["approaches"]
        chosen = approach or next(name for name in ("3", "2", "1", "kaplan") if name in approaches)
        if chosen not in approaches:
            raise UsageError(f"{path} has no approach {chosen!r}", hint=f"it has: {', '.join(approaches)}")
        found = approaches[chosen]
        law, between = from_json(found["law"]), found["estimates"]["exponent"]
        low, high = between["low"], between["high"]
        if not 0 < law.exponent < 1:
            raise InputError(
                f"{path}: by approach {chosen} N grows as C^{law.exponent:.3g}, which nothing can be planned with",
                hint="train more sizes and budgets, or choose another approach: FILE:APPROACH",
            )
        note = "" if low is None else f"a in N ~ C^a is {between['value']:.3g}, between {low:.3g} and {high:.3g}"
        return Coefficients(
            name=f"{path}:{chosen}",
            law=law,
            source=f"fitted to {value['runs']} runs, {found['title']}",
            counts=str(value["counts"]),
            largest=float(value["range"]["flops"][1]),
            note=note,
        )
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(f"{path} is no result of `llmctl scaling fit --format json`") from error


@scaling.command()
@click.option("--flops", type=COUNT, default=CHINCHILLA, show_default=True, help="The budget to compare them at.")
@format_option
def coefficients(flops: float, format_: str) -> None:
    """List the published laws, their sources, and what each makes of a budget."""
    from llmctl_train_pretrain.scaling.laws import optimum, to_json
    from llmctl_train_pretrain.scaling.listing import coefficients_text
    from llmctl_train_pretrain.scaling.published import PUBLISHED

    rows = []
    for name, found in PUBLISHED.items():
        best = optimum(found.law, flops)
        rows.append(
            {
                "name": name,
                "source": found.source,
                "counts": found.counts,
                "note": found.note,
                "law": to_json(found.law),
                "optimal": {"parameters": best.parameters, "tokens": best.tokens, "loss": best.loss},
            }
        )
    _print(format_, rows, lambda: coefficients_text(flops))
