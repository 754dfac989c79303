"""`llmctl doctor`: all checks, one line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmctl.doctor.finding import Check, Finding, examine
from llmctl.errors import LlmctlError, MachineError, UsageError
from llmctl.spec.options import spec_layers
from llmctl.store.commands import store_option

if TYPE_CHECKING:
    from llmctl.spec.overrides import Setting
    from llmctl.spec.resolved import Pipeline


def checks() -> tuple[Check, ...]:
    """Every check, in the order of the report."""
    from llmctl.doctor import compute, machine, packages, request

    return (
        packages.python, packages.llmctl, packages.plugins, packages.extras, packages.onnxruntime_packages,
        packages.cpu_build, packages.known_conflicts, packages.tried,
        compute.driver, compute.torch, compute.onnxruntime,
        machine.memory, machine.cpus, machine.disk, machine.file_system, machine.temporary, machine.open_files,
        machine.text_encoding, machine.clock, machine.programs,
        request.spec,
    )  # fmt: skip


@click.command()
@click.argument("spec", required=False)
@spec_layers
@store_option
@click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print the report."
)
def doctor(
    spec: str | None, profiles: tuple[str, ...], sets: tuple[Setting, ...], store_path: Path | None, format_: str
) -> int:
    """Look for what is wrong with this installation, and with SPEC what it needs that is not here.

    Each problem comes with the command that mends it. Exits with 7 if there is a problem.
    """
    from llmctl.doctor.world import real_world
    from llmctl.store.layout import locate

    if spec is None and (profiles or sets):
        raise UsageError("--profile and --set change a SPEC, and there is none", hint="llmctl doctor SPEC …")

    def read() -> Pipeline:
        from llmctl.registry import get_registry
        from llmctl.spec.pipeline import load_pipeline

        return load_pipeline(spec or "", profiles, sets, registry=get_registry())

    with _waiting():
        store = locate(store_path or (_store(read) if spec else None))
        found = examine(checks(), real_world(store, read if spec else None))
    click.echo(as_json(found) if format_ == "json" else as_text(found))
    return MachineError.exit_code if any(row.state == "problem" for row in found) else 0


def _store(read: Callable[[], Pipeline]) -> Path | None:
    """The store that the spec asks for, as `run` finds it; why the spec cannot be read is among the findings."""
    from llmctl.pipeline.commands import spec_store

    try:
        return spec_store(read())
    except LlmctlError:
        return None


def _waiting() -> AbstractContextManager[object]:
    """A sign of life on a terminal: importing torch takes seconds."""
    from llmctl.console import wants_bars

    if not wants_bars(sys.stderr):
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status("looking at torch, ONNX Runtime and the machine")


def as_json(found: Sequence[Finding]) -> str:
    """`ok`, and every finding with its state, text and fix."""
    rows = [{"check": row.check, "state": row.state, "text": row.text, "fix": row.fix} for row in found]
    return json.dumps({"ok": not any(row.state == "problem" for row in found), "findings": rows}, indent=2)


def as_text(found: Sequence[Finding]) -> str:
    """One line for each finding, below it what mends it; then how many there are."""
    from llmctl.console import wants_colour

    colours = {"warning": "yellow", "problem": "red"}
    coloured = wants_colour(sys.stdout)
    width = max(len(row.check) for row in found)
    lines = []
    for row in found:
        state = f"{row.state:<7}"
        if coloured and row.state in colours:
            state = click.style(state, fg=colours[row.state], bold=True)
        lines.append(f"{state}  {row.check:<{width}}  {row.text}")
        if row.fix:
            lines.append(f"{'':<{width + 11}}{row.fix}")
    counts = [(sum(row.state == state for row in found), state) for state in ("problem", "warning")]
    said = [f"{count} {state}{'s' if count > 1 else ''}" for count, state in counts if count]
    return "\n".join([*lines, ", ".join(said) or "nothing to do"])
