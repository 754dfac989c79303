"""`llmctl run` and `llmctl plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from llmctl.store.commands import format_option, store_option


def _spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `run` and `plan` share: which spec, how it is changed, which of its stages."""
    for option in reversed(
        (
            click.argument("spec", metavar="SPEC"),
            click.option("--profile", "profiles", multiple=True, metavar="NAME", help="Apply a profile of the spec."),
            click.option("--set", "sets", multiple=True, metavar="STAGE.PARAM=VALUE", help="Change a value."),
            click.option("--to", multiple=True, metavar="STAGE", help="Only this stage and what it needs; repeatable."),
            click.option("--until", metavar="STAGE", help="Leave out what comes after this stage."),
            click.option(
                "--cache",
                type=click.Choice(["auto", "refresh"]),
                default="auto",
                show_default=True,
                help="refresh: make everything anew.",
            ),
            store_option,
        )
    ):
        command = option(command)
    return command


@click.command()
@_spec_options
@click.option(
    "--gates",
    type=click.Choice(["stop", "warn"]),
    default="stop",
    show_default=True,
    help="What a missed gate does.",
)
@click.option(
    "--on-busy",
    type=click.Choice(["wait", "fail", "run"]),
    default="wait",
    show_default=True,
    help="When another process does the same work.",
)
@click.option("--events", envvar="LLMCTL_EVENTS", metavar="FILE|fd:N", help="Also write events as JSON lines.")
def run(
    spec: str,
    profiles: tuple[str, ...],
    sets: tuple[str, ...],
    to: tuple[str, ...],
    until: str | None,
    cache: str,
    store_path: Path | None,
    gates: Literal["stop", "warn"],
    on_busy: Literal["wait", "fail", "run"],
    events: str | None,
) -> None:
    """Run SPEC, a file or the name of a shipped spec. What is done already is not done again.

    Stages that act on the world, like serve, run only when named with --to.
    """
    from llmctl.pipeline.next_steps import next_steps
    from llmctl.pipeline.report import write_report
    from llmctl.pipeline.session import run_session
    from llmctl.pipeline.summary import summary
    from llmctl.registry import get_registry
    from llmctl.spec.pipeline import load_pipeline
    from llmctl.store import Store

    pipeline = load_pipeline(spec, profiles, sets, registry=get_registry())
    store = Store.open(store_path)
    result = run_session(
        pipeline, store, events=events, to=to, until=until, gates=gates, on_busy=on_busy, refresh=cache == "refresh"
    )
    report = write_report(pipeline, result)  # before anything is printed: the reader of a pipe may have left
    click.echo(summary(result))
    click.echo(f"report: {report}")
    if error := result.error():
        raise error
    for line in next_steps(pipeline, result, spec):
        click.echo(line)


@click.command()
@_spec_options
@format_option
def plan(
    spec: str,
    profiles: tuple[str, ...],
    sets: tuple[str, ...],
    to: tuple[str, ...],
    until: str | None,
    cache: str,
    store_path: Path | None,
    format_: str,
) -> None:
    """Say what `run` would do with each stage of SPEC, and why. Runs nothing."""
    from llmctl.console import table
    from llmctl.pipeline.inputs import Inputs
    from llmctl.pipeline.plan import Planner
    from llmctl.pipeline.selection import select
    from llmctl.registry import get_registry
    from llmctl.spec.pipeline import load_pipeline
    from llmctl.store import Store

    pipeline = load_pipeline(spec, profiles, sets, registry=get_registry())
    store = Store.open(store_path)
    specs = select(pipeline, to, until)
    inputs = Inputs(pipeline, store)
    inputs.check_paths(specs)
    decisions = Planner(pipeline, store, get_registry(), refresh=cache == "refresh").plan(specs, inputs)
    if format_ == "json":
        rows = [
            {"stage": d.id, "action": d.action, "why": list(d.why), "key": d.keys.action if d.keys else None}
            for d in decisions
        ]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    words = {"cached": "cached", "run": "run", "unknown": "perhaps"}
    click.echo(table(("STAGE", "ACTION", "WHY"), [(d.id, words[d.action], "; ".join(d.why)) for d in decisions]))
