"""`llmctl ps`: which trainings run in a store, where each of their processes is, and which hangs."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import click

from llmctl.store.commands import format_option, store_option


@click.command()
@store_option
@format_option
def ps(store_path: Path | None, format_: str) -> None:
    """List the processes of trainings that run now: step, phase, and for how long they have been in it."""
    from llmctl.console import human_seconds, table
    from llmctl.launch.heartbeats import hung, running
    from llmctl.store import Store

    store, now = Store.open(store_path), time.time()
    found = running(store.work("sha256:" + 64 * "0").parent)
    stages = {beat.stage for beat in found}
    stuck = {(b.stage, b.rank) for stage in stages for b in hung([b for b in found if b.stage == stage], now)}
    if format_ == "json":
        rows = [{**asdict(beat), "hangs": (beat.stage, beat.rank) in stuck} for beat in found]
        click.echo(json.dumps(rows, indent=2))
        return
    if not found:
        click.echo("no training runs in this store")
        return
    lines = [
        (
            beat.stage,
            beat.rank,
            beat.step,
            beat.phase,
            human_seconds(now - beat.time),
            f"{beat.host}:{beat.pid}",
            "hangs" if (beat.stage, beat.rank) in stuck else "",
        )
        for beat in found
    ]
    click.echo(table(("STAGE", "RANK", "STEP", "PHASE", "FOR", "PROCESS", ""), lines))
