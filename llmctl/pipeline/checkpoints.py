"""`llmctl checkpoint`: which checkpoints a training has, and the model that one of them is."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.errors import InputError, UsageError
from llmctl.launch.signals import signals_stop
from llmctl.pipeline.commands import spec_store
from llmctl.pipeline.rehearsal import Rehearsal, trained, with_inputs
from llmctl.spec.options import spec_layers
from llmctl.store.commands import format_option, print_as, store_option
from llmctl.store.copying import check_target, materialise
from llmctl.store.store import Store

if TYPE_CHECKING:
    from llmctl.spec.overrides import Setting

FOLDER = "ckpt"
"""In a stage's work directory, with a directory `step-N` for each checkpoint."""
STEP = re.compile(r"step-(\d+)\Z")
MODEL = "model.hf"
BESIDE = {"device": "cpu", "parallel": {}}
"""A model is made by one process and beside whatever trains."""


@click.command("checkpoint")
@click.argument("spec", metavar="SPEC")
@click.argument("stage", metavar="STAGE")
@spec_layers
@click.option("--step", type=click.IntRange(min=1), help="The checkpoint to take.  [default: the newest]")
@click.option("--to", "target", type=click.Path(path_type=Path), metavar="DIR", help="Write the model to DIR.")
@click.option("--force", is_flag=True, help="Replace whatever is at DIR.")
@store_option
@format_option
def checkpoint(
    spec: str,
    stage: str,
    profiles: tuple[str, ...],
    sets: tuple[Setting, ...],
    step: int | None,
    target: Path | None,
    force: bool,
    store_path: Path | None,
    format_: str,
) -> None:
    """List the checkpoints of a STAGE of SPEC; with --to, make a Hugging Face directory of one of them.

    It is the model that the stage would leave if it ended there, with averaged weights if it averages, and may be made
    while the stage trains. The store does not learn of it. What the stage needs is made first, as `run` does.
    """
    from llmctl.registry import get_registry
    from llmctl.spec.pipeline import load_pipeline

    if target is None and (step is not None or force):
        raise UsageError("--step and --force say how to write a model", hint="add --to DIR")
    pipeline = load_pipeline(spec, profiles, sets, registry=get_registry())
    store = Store.open(store_path or spec_store(pipeline))
    chosen = trained(pipeline, stage)
    if len(chosen) > 1:
        raise UsageError(f"`{stage}` has {len(chosen)} instances", hint=f"choose one, e.g. '{chosen[0].id}'")
    with signals_stop() as stop:
        ((one, bound),) = with_inputs(pipeline, store, chosen)
        folder = store.work(Rehearsal.of(pipeline, store, one, bound, 1, stop).keys.resume) / FOLDER
        found = listed(folder)
        if target is None:
            print_as(format_, found, lambda: table_of(found, one.id))
            return
        steps = [row["step"] for row in found]
        if step is None and not any(steps):
            hint = "save_every writes them; SIGUSR2 to `llmctl run` asks for one"
            raise InputError(f"`{one.id}` has no checkpoint yet", hint=hint)
        chosen_step = max(steps, default=0) if step is None else step
        if chosen_step not in steps or not chosen_step:
            there = ", ".join(str(each) for each in steps if each) or "none"
            raise InputError(f"`{one.id}` has no checkpoint of step {chosen_step}", hint=f"there: {there}")
        check_target(target.absolute(), force=force)
        making = Rehearsal.of(pipeline, store, one, bound, chosen_step, stop, BESIDE)
        export(making, folder / f"step-{chosen_step}", target.absolute(), force=force)
    click.echo(f"{MODEL}  step {chosen_step} of {one.id}  {target}")


def listed(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints in a directory, by step."""
    rows = []
    for path in folder.glob("step-*"):
        if match := STEP.match(path.name):
            size = sum(file.stat().st_size for file in path.iterdir())
            rows.append(
                {"step": int(match[1]), "bytes": size, "seconds_ago": round(time.time() - path.stat().st_mtime)}
            )
    return sorted(rows, key=lambda row: int(row["step"]))


def table_of(rows: list[dict[str, Any]], stage: str) -> str:
    """The same for a person."""
    from llmctl.console import human_bytes, table

    if not rows:
        return f"`{stage}` has no checkpoint"
    cells = [(str(row["step"]), human_bytes(row["bytes"]), f"{row['seconds_ago']} s ago") for row in rows]
    return table(("STEP", "SIZE", "WRITTEN"), cells)


def export(making: Rehearsal, source: Path, target: Path, *, force: bool) -> None:
    """Let the stage go on from one checkpoint to the same step, so that it only writes its model; copy that."""
    ports = [port for port, type in making.spec.outputs.items() if type == MODEL]
    if not ports:
        raise UsageError(f"`{making.spec.id}` makes no {MODEL}", hint="only a model can be made of a checkpoint")
    with making.scratch() as store:
        copy = store.work(making.keys.resume) / FOLDER / source.name
        try:
            shutil.copytree(source, copy, copy_function=link)
        except (FileNotFoundError, shutil.Error) as error:  # the training has just removed it
            raise InputError(f"{source} is gone", hint="run the same command again") from error
        made = making.train(store)
        materialise(made.store.get(made.outcome.outputs[ports[0]]), target, force=force)


def link(source: str, target: str) -> None:
    """A second name of a file that never changes; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
