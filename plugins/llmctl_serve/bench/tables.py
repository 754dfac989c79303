"""What `llmctl bench` prints: the loads as a table, what the server says of them as another, and what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from llmctl.console import human_bytes, human_number, table
from llmctl_serve.bench.exposition import MEMORY
from llmctl_serve.bench.summary import LATE, hint_text

Load = Mapping[str, Any]
WIDEST = 1000
"""Columns of a table, at most."""


def show(result: Mapping[str, Any]) -> None:
    """Print the tables: rich ones on a terminal, plain ones into a pipe; columns with nothing to say are left out."""
    loads = result["loads"]
    click.echo(f"{result['model']} at {result['url']} ({result['api']}); milliseconds")
    _print_table(*load_table(loads, bool(result["limits"])))
    if any(load["server"] for load in loads):
        click.echo("by the server's own /metrics")
        _print_table(*server_table(loads))
    if unknown := unknown_text(result):
        click.echo(unknown, err=True)
    different, asked = result["prompts"]["different"], result["prompts"]["asked"]
    if asked > different:
        said = f"warning: {asked} requests had {different} different prompts, so a prefix cache may have held some"
        click.echo(said, err=True)
    if uncounted := sum(load["uncounted"] for load in loads):
        said = f"warning: the server does not say how many tokens {uncounted} answers have: their pieces are counted"
        click.echo(said, err=True)
    for load in loads:
        _remark(load)


def unknown_text(result: Mapping[str, Any]) -> str:
    """What the server does not say of itself, and why; empty where it says all."""
    if result["metrics_missing"]:
        return f"the server's memory and counts are not known: no /metrics ({result['metrics_missing']})"
    if not any("memory" in (load["server"] or {}) for load in result["loads"]):
        return f"the server's memory is not known: its /metrics has no {MEMORY}"
    return ""


def _remark(load: Load) -> None:
    """What a reader must know of one load beside its numbers."""
    for kind, count in load["errors"].items():
        click.echo(f"{load['load']}: {count} failed, {kind}: {load['error_examples'][kind]}")
    for kind, one in load["rejected"]["kinds"].items():
        click.echo(f"{load['load']}: {one['requests']} rejected, {kind}, {hint_text(one)}: {one['example']}")
    if load["client_lag"]["p99"] > LATE:
        late = load["client_lag"]["p99"] * 1000
        click.echo(f"warning: {load['load']}: this client began requests {late:.0f} ms late (p99)", err=True)
    server = load["server"] or {}
    if server.get("agrees") is False:
        counted = ", ".join(f"{count} of status {status}" for status, count in server["requests"].items()) or "none"
        said = (
            f"warning: {load['load']}: the server counted other requests ({counted}); does somebody else ask it, too?"
        )
        click.echo(said, err=True)


def load_table(loads: Sequence[Load], goodput: bool) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of what the client measured."""
    rejected = any(load["rejected"]["requests"] for load in loads)
    speed_up = sum(load["kind"] == "closed" for load in loads) > 1
    headers = ["load", "requests", "failed", *(["rejected"] if rejected else []), "req/s", "tokens/s"]
    headers += [*(["speed-up"] if speed_up else []), "TTFT p50", "p95", "ITL p50", "p95", "TPOT p50", "E2E p50", "p95"]
    headers += ["goodput", "good/s"] if goodput else []
    return headers, [_row(load, rejected, speed_up) for load in loads]


def _row(load: Load, rejected: bool, speed_up: bool) -> list[str]:
    def cell(name: str, level: str) -> str:
        return milliseconds(load[name][level]) if name in load else "-"

    row = [load["load"], str(load["requests"]), str(load["failed"])]
    row += [str(load["rejected"]["requests"])] if rejected else []
    row += [human_number(load["requests_per_s"]), human_number(load["output_tokens_per_s"])]
    row += [times(load["speed_up"])] if speed_up else []
    row += [cell(n, q) for n, q in (("ttft", "p50"), ("ttft", "p95"), ("itl", "p50"), ("itl", "p95"), ("tpot", "p50"))]
    row += [cell("e2e", "p50"), cell("e2e", "p95")]
    if good := load.get("goodput"):
        row += [f"{100 * good['share']:.1f} %", human_number(good["requests_per_s"])]
    return row


def server_table(loads: Sequence[Load]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of what the server's metrics say."""
    headers = ["load", "answered", "429, 503", "tokens", "answers per pass", "memory first", "last", "largest"]
    return [*headers, "2nd half"], [[load["load"], *server_cells(load["server"] or {})] for load in loads]


def server_cells(server: Mapping[str, Any]) -> list[str]:
    """Counts and memory of one load; `-` where the server does not say."""
    counts = ["-"] * 4
    if "requests" in server:
        answered = server["requests"].get("200", 0)
        away = sum(server["requests"].get(status, 0) for status in ("429", "503"))
        batch = server["mean_batch"]
        counts = [str(answered), str(away), str(server["completion_tokens"]), f"{batch:.2f}" if batch else "-"]
    memory = server.get("memory")
    if memory is None:
        return [*counts, *["-"] * 4]
    growth = memory["late_growth"]
    sizes = [human_bytes(memory[name]) for name in ("first", "last", "largest")]
    return [*counts, *sizes, "-" if growth is None else f"{growth:+.1%}".replace("%", " %")]


def milliseconds(seconds: float | None) -> str:
    """`0.42`, `12.3`, `1250`: milliseconds with three figures."""
    if seconds is None:
        return "…"
    value = seconds * 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(factor: float | None) -> str:
    """`3.4x`."""
    return "-" if factor is None else f"{factor:.2f}x"


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not sys.stdout.isatty():
        click.echo(table(headers, rows))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(headers):
        shown.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    # On a narrow terminal lines go on below: digits that are cut off say something else.
    whole = Console(width=WIDEST).measure(shown).maximum
    Console(highlight=False, width=max(Console().width, whole)).print(shown)
