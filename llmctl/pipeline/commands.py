"""`llmctl run` and `llmctl plan`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from llmctl.launch.stopping import GRACE
from llmctl.spec.options import spec_layers
from llmctl.store.commands import format_option, store_option

if TYPE_CHECKING:
    from llmctl.pipeline.plan import Decision
    from llmctl.spec.overrides import Setting
    from llmctl.spec.resolved import Pipeline
    from llmctl.store import Store


strict_option = click.option(
    "--strict-env",
    "strict",
    is_flag=True,
    help="Results of another Python, torch, CUDA or driver do not count.",
)


def _spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `run` and `plan` share: which spec, how it is changed, which of its stages."""
    for option in reversed(
        (
            click.argument("spec", metavar="SPEC"),
            spec_layers,
            click.option("--to", multiple=True, metavar="STAGE", help="Only this stage and what it needs; repeatable."),
            click.option("--until", metavar="STAGE", help="Leave out what comes after this stage."),
            click.option(
                "--from",
                "start",
                metavar="STAGE",
                help="Only this stage and what depends on it; what lies before must be done.",
            ),
            click.option(
                "--cache",
                type=click.Choice(["auto", "refresh"]),
                default="auto",
                show_default=True,
                help="refresh: make everything anew.",
            ),
            strict_option,
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
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many stages may run at once, as far as cores, GPUs and memory suffice.",
)
@click.option("--locked", is_flag=True, help="Run only if sources and plugins are those of sources.lock.jsonl.")
@click.option("--keep-going", is_flag=True, help="After a failure still run what does not depend on it.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=GRACE,
    show_default=True,
    metavar="SECONDS",
    help="How long a stage that is to stop may take for its checkpoint.",
)
@click.option("--events", envvar="LLMCTL_EVENTS", metavar="FILE|fd:N", help="Also write events as JSON lines.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    envvar="LLMCTL_LOG_FORMAT",
    help="What stderr gets: lines for a person, or the events as JSON lines.",
)
def run(
    spec: str,
    profiles: tuple[str, ...],
    sets: tuple[Setting, ...],
    to: tuple[str, ...],
    until: str | None,
    start: str | None,
    cache: str,
    strict: bool,
    store_path: Path | None,
    gates: Literal["stop", "warn"],
    on_busy: Literal["wait", "fail", "run"],
    jobs: int,
    locked: bool,
    keep_going: bool,
    grace: float,
    events: str | None,
    log_format: str | None,
) -> None:
    """Run SPEC, a file or the name of a shipped spec. What is done already is not done again.

    STAGE is a stage, with all its rows if it has a matrix, or one row: sft[lr=3e-5].

    Stages that act on the world, like serve, run only when named with --to.
    """
    from llmctl.pipeline.locking import check_lock, lock_file
    from llmctl.pipeline.next_steps import next_steps
    from llmctl.pipeline.report import write_report
    from llmctl.pipeline.session import run_session
    from llmctl.pipeline.summary import summary
    from llmctl.registry import get_registry
    from llmctl.spec.pipeline import load_pipeline
    from llmctl.spec.user_config import chosen_log_format
    from llmctl.store import Store

    pipeline = load_pipeline(spec, profiles, sets, registry=get_registry())
    store = Store.open(store_path or spec_store(pipeline))
    if locked:
        check_lock(pipeline, store, get_registry(), lock_file(pipeline))
    result = run_session(
        pipeline,
        store,
        events=events,
        log_format=chosen_log_format(log_format),
        to=to,
        until=until,
        start=start,
        jobs=jobs,
        keep_going=keep_going,
        gates=gates,
        on_busy=on_busy,
        refresh=cache == "refresh",
        strict=strict,
        grace=grace,
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
@click.option("--measure", is_flag=True, help="Try a few steps of trainings whose speed is not known.")
@click.option(
    "--price", type=click.FloatRange(min=0), metavar="PER_HOUR", help="Of a process (a GPU, a machine): adds the cost."
)
@click.option(
    "--memory", metavar="SIZE", help="What each process may have of memory, where not this machine is meant: 80GiB."
)
@format_option
def plan(
    spec: str,
    profiles: tuple[str, ...],
    sets: tuple[Setting, ...],
    to: tuple[str, ...],
    until: str | None,
    start: str | None,
    cache: str,
    strict: bool,
    store_path: Path | None,
    measure: bool,
    price: float | None,
    memory: str | None,
    format_: str,
) -> None:
    """Say what `run` would do with each stage of SPEC, and why; of trainings their memory, time and cost. Runs nothing.

    A training that cannot fit is exit 7.
    """
    from llmctl.console import table
    from llmctl.pipeline import forecasts
    from llmctl.pipeline.inputs import Inputs
    from llmctl.pipeline.plan import Planner
    from llmctl.pipeline.run import check_given
    from llmctl.pipeline.selection import select
    from llmctl.registry import get_registry
    from llmctl.spec.pipeline import load_pipeline
    from llmctl.store import Store

    pipeline = load_pipeline(spec, profiles, sets, registry=get_registry())
    store = Store.open(store_path or spec_store(pipeline))
    chosen = select(pipeline, to, until, start)
    inputs = Inputs(pipeline, store)
    inputs.check_paths(chosen.specs)
    refresh = cache == "refresh"
    planner = Planner(pipeline, store, get_registry(), refresh=refresh, given=chosen.given, strict=strict)
    decisions = planner.plan(chosen.specs, inputs)
    check_given(chosen, decisions)
    rows = [(d.id, d.action, plan_notes(d, store)) for d in decisions]
    limit = None if memory is None else memory_of(memory)
    found = forecasts.outlooks(pipeline, chosen.specs, decisions, planner, inputs, limit)
    found = forecasts.measured(found) if measure else found
    if format_ == "json":
        keys = [d.keys.action if d.keys else None for d in decisions]
        listed: list[dict[str, Any]] = [
            {"stage": id, "action": action, "why": why, "key": key}
            for (id, action, why), key in zip(rows, keys, strict=True)
        ]
        trainings = {outlook.stage: forecasts.to_json(outlook, price) for outlook in found}
        listed = [{**row, "forecast": trainings.get(str(row["stage"]))} for row in listed]
        click.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        forecasts.refuse(found)
        return
    words = {"unknown": "perhaps"}
    click.echo(
        table(("STAGE", "ACTION", "WHY"), [(id, words.get(action, action), "; ".join(why)) for id, action, why in rows])
    )
    for line in forecasts.lines(found, price):
        click.echo(line)
    forecasts.refuse(found)


def memory_of(text: str) -> int:
    """Bytes that `--memory` names; UsageError if it is no size."""
    from llmctl.errors import UsageError
    from llmctl.spec.skeleton import memory_bytes

    try:
        return memory_bytes(text)
    except ValueError as error:
        raise UsageError(f"--memory {text}: {error}", hint="80GiB, or 512MiB") from error


def spec_store(pipeline: Pipeline) -> Path | None:
    """The store that a spec asks for; what the environment says wins."""
    from llmctl.store.layout import ENVIRONMENT

    return Path(pipeline.store) if pipeline.store and not os.environ.get(ENVIRONMENT) else None


def plan_notes(decision: Decision, store: Store) -> list[str]:
    """Why a stage runs; of one that does not, what is worth knowing about its result."""
    from llmctl.pipeline.drift import drift

    notes = list(decision.why)
    if decision.pointer is not None:
        from llmctl.store.commit import intact

        manifests = (intact(artifact.path) for artifact in decision.outputs.values())
        made = next((found.provenance.get("observed") or {} for found in manifests if found), {})
        notes += [f"made with {what} {then}, now {now}" for what, then, now in drift(made, ("python", "torch"))]
        if decision.collected:
            notes.append("its bytes were collected (ephemeral); nothing needs them")
    return notes
