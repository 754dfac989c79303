"""Probe model after model with the same labelled words, and write what was found as numbers, a table and a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.console import table
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.reading import TorchReader, open_reader
from llmctl_embed.linear_probe import Labelled, Probed, probe
from llmctl_embed.probe_params import ProbeParams
from llmctl_embed.word_states import Sentence, WordStates, read_sentences, word_states

DATA, PAGE = "probe.json", "probe.html"


@dataclass(frozen=True)
class Row:
    """What was found about one column at one step."""

    step: int
    column: str
    probed: Probed

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "step": self.step,
            "column": self.column,
            **asdict(self.probed),
            "selectivity": self.probed.selectivity,
        }


def run(ctx: Context, params: ProbeParams, models: list[Artifact], data: Artifact) -> None:
    """Write `probe.json`, `probe.html` and the curves; report the last model's numbers and what was gained."""
    steps = steps_of(params, models)
    if params.threads:
        torch.set_num_threads(params.threads)
    train = read_sentences(data, params.split, params.labels, params.limit)
    test = read_sentences(data, params.test_split, params.labels, params.limit)
    check_labels(data, params, train)
    rows: list[Row] = []
    for number, (step, reader, tokenizer) in enumerate(readers(params, models, steps), start=1):
        rows += probe_model(ctx, params, step, reader, tokenizer, train, test)
        ctx.progress(number, len(steps) + params.untrained)
        if ctx.should_stop():
            raise ctx.stopped(number)
    rows.sort(key=lambda row: row.step)
    for line in table_of(rows).splitlines():
        ctx.log(line)
    write(ctx, rows)
    ctx.report(numbers(params, rows))


def steps_of(params: ProbeParams, models: list[Artifact]) -> list[int]:
    """The step of each model. UsageError if not as many are named as there are models."""
    if params.steps and len(params.steps) != len(models):
        raise UsageError(
            f"{len(params.steps)} steps are named for {len(models)} models",
            hint="name the step of each, in their order",
        )
    return params.steps or list(range(1, len(models) + 1))


def check_labels(data: Artifact, params: ProbeParams, train: list[Sentence]) -> None:
    """InputError for a column with a single label, about which nothing can be asked."""
    for column in params.labels:
        names = {label for sentence in train for label in sentence.labels[column]}
        if len(names) < 2:
            raise InputError(
                f"column `{column}` of split `{params.split}` of {data.path} has one label only, {names.pop()!r}",
                hint="a probe tells two or more apart",
            )


def readers(
    params: ProbeParams, models: list[Artifact], steps: list[int]
) -> Iterator[tuple[int, TorchReader, Tokenizer]]:
    """(step, model, its tokenizer) of each model; first, if wanted, of one like the first with fresh weights."""
    if params.untrained:
        yield 0, fresh(open_reader(models[0].path, params.device, states=True), params.seed), _tokenizer(models[0])
    for step, model in zip(steps, models, strict=True):
        yield step, open_reader(model.path, params.device, states=True), _tokenizer(model)


def _tokenizer(model: Artifact) -> Tokenizer:
    return Tokenizer.load(model.path)


def fresh(reader: TorchReader, seed: int) -> TorchReader:
    """The same model with the weights that a training would begin with."""
    from llmctl.nn.transformer import Transformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Transformer(reader.model.config)
    return TorchReader(made.to(reader.model.embedding.weight.device), states=True)


def probe_model(
    ctx: Context,
    params: ProbeParams,
    step: int,
    reader: TorchReader,
    tokenizer: Tokenizer,
    train: list[Sentence],
    test: list[Sentence],
) -> list[Row]:
    """A row for each column."""
    states = [word_states(reader, tokenizer, sentences, params.layer) for sentences in (train, test)]
    left_out = sum(found.too_long for found in states)
    if left_out:
        ctx.warn(f"step {step}: {left_out} rows do not fit the model's context of {reader.context_length} tokens")
    rows = []
    for column in params.labels:
        learnt, asked = (
            labelled(found, sentences, column) for found, sentences in zip(states, (train, test), strict=True)
        )
        row = Row(step, column, probe(learnt, asked, params.l2, params.seed))
        for name in ("accuracy", "selectivity"):
            ctx.metric(f"{column}.{name}", getattr(row.probed, name), step)
        rows.append(row)
    return rows


def labelled(found: WordStates, sentences: list[Sentence], column: str) -> Labelled:
    """The vectors with their words and the labels of one column."""
    words = [sentences[row].words[word] for row, word in found.places]
    return Labelled(found.vectors, words, [sentences[row].labels[column][word] for row, word in found.places])


def numbers(params: ProbeParams, rows: list[Row]) -> dict[str, float | int]:
    """The last step's numbers of each column, and by how much accuracy and selectivity have risen since the first."""
    values: dict[str, float | int] = {"models": len({row.step for row in rows})}
    for column in params.labels:
        own = [row.probed for row in rows if row.column == column]
        first, last = own[0], own[-1]
        values |= {f"{column}.{name}": value for name, value in asdict(last).items()}
        values[f"{column}.selectivity"] = last.selectivity
        values[f"{column}.gain"] = last.accuracy - first.accuracy
        values[f"{column}.selectivity_gain"] = last.selectivity - first.selectivity
    return values


def table_of(rows: list[Row]) -> str:
    """For a terminal."""
    cells = [(str(row.step), row.column, *(f"{row.to_dict()[name]:.3f}" for name in COLUMNS)) for row in rows]
    return table(("STEP", "COLUMN", *(name.upper() for name in COLUMNS)), cells)


COLUMNS = ("accuracy", "control", "selectivity", "shuffled", "majority")


def write(ctx: Context, rows: list[Row]) -> None:
    """The rows as JSON, as a page, and as curves by step."""
    found = [row.to_dict() for row in rows]
    directory = ctx.output("report")
    (directory / DATA).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (directory / PAGE).write_text(page(found), encoding="utf-8")
    curves: dict[int, dict[str, float]] = {}
    for row in found:
        point = curves.setdefault(row["step"], {"step": row["step"]})
        point |= {f"{row['column']}.{name}": row[name] for name in COLUMNS}
    lines = "".join(json.dumps(point, sort_keys=True) + "\n" for point in curves.values())
    (ctx.output("metrics") / "curves.jsonl").write_text(lines, encoding="utf-8")


def page(rows: list[dict[str, Any]]) -> str:
    """A chart for each column, with its controls, and the table."""
    from llmctl.pipeline.charts import line_chart
    from llmctl.pipeline.report import fill_page

    columns = dict.fromkeys(row["column"] for row in rows)
    charts = []
    for column in columns:
        own = [row for row in rows if row["column"] == column]
        series = {name: [(row["step"], row[name]) for row in own] for name in COLUMNS}
        charts.append((column, line_chart(f"{column}: share of words that are right", series)))
    steps = len({row["step"] for row in rows})
    return fill_page(Path(__file__).with_name("probe.html"), charts=charts, rows=rows, names=COLUMNS, steps=steps)
