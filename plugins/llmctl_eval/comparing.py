"""Run `compare`: the variants take turns, then answer the same text; a table, a page and the best of each column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.console import human_bytes
from llmctl_eval.compare_params import CompareParams
from llmctl_eval.compared_quality import Quality, read_quality
from llmctl_eval.tradeoffs import LARGER, SMALLER, Numbers, best, median_ratio, pareto, quartiles
from llmctl_eval.variants import Variant

HEADINGS = {
    "bytes": "size",
    "first_token_ms": "first token",
    "step_ms": "step",
    "tokens_per_s": "tokens/s",
    "peak_memory_bytes": "memory",
    "bits_per_byte": "bits/byte",
    "top1_agreement": "top-1",
}
"""The columns of the table, in order."""
TIMED = {"first_token": "first_token_ms", "step": "step_ms", "batch": "tokens_per_s"}
RATIOS = {"first_token": "first_token_ratio", "step": "step_ratio", "batch": "tokens_per_s_ratio"}


def run(ctx: Context, params: CompareParams, model: Sequence[Artifact], data: Artifact | None = None) -> None:
    """Measure, report, and leave a page."""
    names = names_of(params, model)
    quality = None if data is None else read_quality(params, model, data)
    with ExitStack() as stack:
        variants = []
        for name, artifact in zip(names, model, strict=True):
            ctx.log(f"{name}: {artifact.path}")
            variants.append(Variant.start(name, artifact, params.device, params.threads))
            stack.callback(variants[-1].close)
        check_room(params, variants)
        take_turns(ctx, params, variants)
        found = gather(ctx, params, variants, quality)
    for line in table(found):
        ctx.log(line)
    ctx.report(metrics(found))
    ctx.report({"backend": variants[0].backend, "models": len(variants)})
    if ctx.wants("report"):
        page = render(found, params)
        (ctx.output("report") / "compare.html").write_text(page, encoding="utf-8")


def names_of(params: CompareParams, models: Sequence[Artifact]) -> list[str]:
    """The name of each variant. UsageError for one model alone, or if not as many are named as there are."""
    if len(models) < 2:
        raise UsageError("there is one model alone", hint="bind two bundles or more to `model`")
    if params.names and len(params.names) != len(models):
        raise UsageError(
            f"{len(params.names)} names are given for {len(models)} models", hint="name each, in their order"
        )
    return params.names or [f"model-{number}" for number in range(1, len(models) + 1)]


def check_room(params: CompareParams, variants: Sequence[Variant]) -> None:
    """InputError if the prompt and the steps exceed the context of a variant."""
    for variant in variants:
        if params.prompt_tokens + params.steps > variant.context:
            raise InputError(
                f"variant {variant.name}: {params.prompt_tokens} tokens and {params.steps} steps exceed its context of "
                f"{variant.context}",
                hint="lower `prompt_tokens` or `steps`",
            )


def take_turns(ctx: Context, params: CompareParams, variants: Sequence[Variant]) -> None:
    """Every variant once a round, the order turned round each time, so that a machine's drift meets all alike."""
    vocabulary = min(variant.vocabulary for variant in variants)
    prompt = np.random.default_rng(1).integers(0, vocabulary, params.prompt_tokens).tolist()
    for number in range(params.rounds + 1):
        if ctx.should_stop():
            raise ctx.stopped(number)
        for variant in variants[:: -1 if number % 2 else 1]:
            taken = variant.ask("turn", prompt=prompt, steps=params.steps, batch=params.batch)
            if number:  # the first round wakes everything up
                variant.turns.append(taken)
        ctx.progress(number + 1, params.rounds + 1)


def gather(
    ctx: Context, params: CompareParams, variants: Sequence[Variant], quality: Quality | None
) -> dict[str, dict[str, float]]:
    """All numbers of each variant by name. Memory is that of the turns: quality is asked after them."""
    found = {variant.name: numbers_of(variant, variants[0], params.batch) for variant in variants}
    for name, values in ({} if quality is None else quality.measure(ctx, variants)).items():
        found[name] |= values
    return found


def numbers_of(variant: Variant, first: Variant, batch: int) -> dict[str, float]:
    """Size, times, throughput and memory, each time with its quartiles, and the ratios to the first variant."""
    values: dict[str, float] = {"bytes": variant.bytes, "peak_memory_bytes": max(t["peak"] for t in variant.turns)}
    for key, column in TIMED.items():
        own, firsts = (side_values(side, key, batch) for side in (variant, first))
        values |= quartiles(own).named(column, "_") | median_ratio(own, firsts).named(RATIOS[key], "_")
    return values


def side_values(variant: Variant, key: str, batch: int) -> list[float]:
    """Milliseconds of every turn, or tokens per second."""
    seconds = [turn[key] for turn in variant.turns]
    return [batch / one for one in seconds] if key == "batch" else [1000 * one for one in seconds]


def metrics(found: Mapping[str, Numbers]) -> dict[str, Any]:
    """Everything under `<variant>.<column>`, the best of each column, and who is on the Pareto front."""
    values: dict[str, Any] = {f"{name}.{column}": v for name, numbers in found.items() for column, v in numbers.items()}
    front = pareto(found)
    values |= {f"{name}.pareto": name in front for name in found}
    for column in (*SMALLER, *LARGER):
        if names := best(found, column):
            values[f"best.{column}"] = ", ".join(names)
    return {**values, "pareto": ", ".join(front)}


def cell(column: str, values: Numbers) -> str:
    """A number as a person reads it, with its ratio to the first variant where there is one."""
    if column not in values:
        return "-"
    value = values[column]
    if column.endswith("bytes"):
        return human_bytes(value)
    if column in ("bits_per_byte", "top1_agreement"):
        return f"{value:.4f}"
    name = next(RATIOS[key] for key, own in TIMED.items() if own == column)
    low, high = values[f"{name}_low"], values[f"{name}_high"]
    text = (f"{value:.0f}" if value >= 100 else f"{value:.3g}") + (" ms" if column.endswith("ms") else "")
    # The first variant beside itself says nothing.
    return text if low == high else f"{text} ({values[name]:.2f}: {low:.2f}–{high:.2f})"


def cells(found: Mapping[str, Numbers]) -> Iterator[list[str]]:
    """The heading and a row for each variant; `*` behind the best of a column. Columns that nobody has are left out."""
    columns = [column for column in HEADINGS if any(column in values for values in found.values())]
    winners = {column: best(found, column) for column in columns}
    front = pareto(found)
    yield ["variant", *(HEADINGS[column] for column in columns), "Pareto"]
    for name, values in found.items():
        marked = [cell(column, values) + (" *" if name in winners[column] else "  ") for column in columns]
        yield [name, *marked, "yes" if name in front else "no"]


def table(found: Mapping[str, Numbers]) -> Iterator[str]:
    """The same in columns."""
    rows = list(cells(found))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        parts = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(parts)
    yield "*: best. In brackets: ratio to the first variant, median of turn by turn, and its 95 % interval."


def render(found: Mapping[str, Numbers], params: CompareParams) -> str:
    """A page with the table, and what of quality and size stands against speed."""
    from llmctl.pipeline.report import fill_page
    from llmctl_eval.scatter import scatter

    charts = []
    for column, title, unit in (("bits_per_byte", "bits per byte", 1), ("bytes", "MiB", 2**20)):
        points = {name: (v["step_ms"], v[column] / unit) for name, v in found.items() if column in v}
        if points:
            charts.append((f"{title} against ms per step", scatter(points, pareto(found))))
    head, *rows = cells(found)
    return fill_page(
        Path(__file__).with_name("compare.html"), head=head, rows=rows, charts=charts, **params.model_dump()
    )
