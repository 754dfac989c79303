"""The page of a measurement: latencies as distributions and over time, and what throughput costs in latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.pipeline.charts import Points, line_chart
from llmctl.pipeline.report import fill_page
from llmctl_serve.bench.load import Record
from llmctl_serve.bench.summary import hint_text
from llmctl_serve.bench.tables import milliseconds, server_table, times, unknown_text

NAMES = {
    "ttft": "Time to first token",
    "itl": "Inter-token latency",
    "tpot": "Time per output token",
    "e2e": "End to end",
}


def render(result: Mapping[str, Any], records: Sequence[Sequence[Record]]) -> str:
    """The page of a result, `records` being those of its loads."""
    loads = result["loads"]
    answered = [[record for record in some if record.ok] for some in records]
    labels = [load["load"] for load in loads]
    charts = [(title, chart) for title, chart in _charts(loads, labels, answered) if chart]
    seen = [load for load in loads if load["server"]]
    headers, rows = server_table(seen)
    return fill_page(
        Path(__file__).with_name("page.html"),
        result=result,
        loads=loads,
        names=NAMES,
        charts=charts,
        server={"headers": headers, "rows": rows},
        unknown=unknown_text(result),
        speed_up=sum(load["kind"] == "closed" for load in loads) > 1,
        ms=milliseconds,
        times=times,
        hint_text=hint_text,
    )


def _charts(
    loads: Sequence[Mapping[str, Any]], labels: Sequence[str], answered: Sequence[Sequence[Record]]
) -> Iterator[tuple[str, str]]:
    values = {
        "ttft": [[r.ttft for r in some] for some in answered],
        "itl": [[gap for r in some for gap in r.gaps] for some in answered],
        "e2e": [[r.e2e for r in some] for some in answered],
    }
    for name, groups in values.items():
        series = {label: cumulative(group) for label, group in zip(labels, groups, strict=True)}
        title = f"{NAMES[name]}: share of {'gaps' if name == 'itl' else 'requests'} within a time"
        yield title, line_chart(title, series, "ms")
    times = {
        label: sorted((r.intended, r.ttft * 1000) for r in some) for label, some in zip(labels, answered, strict=True)
    }
    yield "Time to first token over time, ms", line_chart("Time to first token over time", times, "s since the begin")
    memory = {
        load["load"]: [(at, bytes_ / 2**20) for at, bytes_ in load["server"]["memory"]["samples"]]
        for load in loads
        if load["server"] and "memory" in load["server"]
    }
    yield "Resident memory of the server, MiB", line_chart("Resident memory of the server", memory, "s since the begin")
    closed = sorted((load["value"], load["output_tokens_per_s"]) for load in loads if load["kind"] == "closed")
    if len(closed) > 1:
        title = "Throughput against concurrency, output tokens/s"
        yield title, line_chart(title, {"output tokens/s": closed}, "requests at a time")
    if len(loads) > 1:
        for name, title in (("ttft", "time to first token"), ("e2e", "end to end")):
            series = {
                f"{level} {kind}": sorted(_points(loads, kind, name, level))
                for kind in ("closed", "poisson")
                for level in ("p50", "p95", "p99")
            }
            title = f"Throughput against {title}, ms"
            yield title, line_chart(title, series, "output tokens/s")


def _points(loads: Sequence[Mapping[str, Any]], kind: str, name: str, level: str) -> Points:
    return [
        (load["output_tokens_per_s"], load[name][level] * 1000)
        for load in loads
        if load["kind"] == kind and name in load
    ]


def cumulative(values: Sequence[float]) -> Points:
    """The empirical distribution: (milliseconds, share of values up to it), at most 200 points and the extremes."""
    ordered = sorted(values)
    size = len(ordered)
    places = range(size) if size <= 200 else sorted({round(i * (size - 1) / 199) for i in range(200)})
    return [(ordered[i] * 1000, (i + 1) / size) for i in places]
