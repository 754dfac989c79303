"""`llmctl init`: from a goal to a spec that runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from llmctl.errors import InputError, LlmctlError, UsageError

if TYPE_CHECKING:
    from llmctl.starter.goals import Goal
    from llmctl.starter.material import Found

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
LONGEST = 200
"""Characters of a name; the names of its files, which add a little, must fit into 255."""


def _goal_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    from llmctl.starter.goals import GOALS

    return [CompletionItem(goal.name, help=goal.help) for goal in GOALS.values() if goal.name.startswith(incomplete)]


@click.command()
@click.argument("goal", required=False, shell_complete=_goal_names)
@click.option("--name", help="Name of the pipeline and of the file.  [default: the goal]")
@click.option("--directory", type=click.Path(path_type=Path), default=Path(), help="Where to write.  [default: here]")
@click.option("--data", type=click.Path(), help="Your data: a file, a folder or a glob.")
@click.option("--model", type=click.Path(), help="Your model: the directory with its config.json.")
@click.option("--force", is_flag=True, help="Replace a file of that name.")
def init(goal: str | None, name: str | None, directory: Path, data: str | None, model: str | None, force: bool) -> None:
    """Write a commented spec for GOAL: pretrain, fine-tune, compress, rag or evaluate.

    Without GOAL it asks. Nothing runs; the commands to go on with are printed.
    """
    from llmctl.starter.goals import GOALS, find_data, find_goal, find_model

    if goal is None:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError("which goal?", hint=f"goals: {', '.join(GOALS)}")
        answers = ask(name, data, model)
        chosen, name, found, base = answers["goal"], answers["name"], answers["data"], answers["model"]
    else:
        chosen = find_goal(goal)
        found = find_data(chosen, data) if data is not None else None
        base = find_model(chosen, model) if model is not None else None
    write(chosen, _checked(name or chosen.name), directory, found, base, force=force)


def _checked(name: str) -> str:
    if len(name) > LONGEST:
        raise UsageError(f"a name of {len(name)} characters is too long", hint=f"at most {LONGEST}")
    if not NAME.match(name):
        raise UsageError(f"`{name}` is no name for a spec", hint="letters, digits, `.`, `_` and `-`, e.g. my-model")
    return name


# -- asking -----------------------------------------------------------------------------------------------------------


def ask(name: str | None, data: str | None, model: str | None) -> dict[str, Any]:
    """Goal, data, model and name, asked on the terminal where they were not given; each answer is checked at once."""
    from llmctl.starter.goals import GOALS, find_data, find_goal, find_model

    goals = list(GOALS.values())
    click.echo("What do you want to do?", err=True)
    for number, goal in enumerate(goals, start=1):
        click.echo(f"  {number}  {goal.name:<10}  {goal.help}", err=True)

    def read_goal(text: str) -> Goal:
        return goals[int(text) - 1] if text.isdecimal() and 0 < int(text) <= len(goals) else find_goal(text)

    chosen: Goal = _prompt("Number or name", "1", read_goal)
    later = "Enter: Python's own library" if chosen.corpus else "Enter: put it in later"
    found = _material("Your data, a file, folder or glob", later, data, lambda path: find_data(chosen, path))
    base = None
    if chosen.models:
        later = "Enter: put it in later" if chosen.model_needed else "Enter: none"
        base = _material("Your model, a directory", later, model, lambda path: find_model(chosen, path))
    return {
        "goal": chosen,
        "data": found,
        "model": base,
        "name": name or _prompt("Name", chosen.name, _checked),
    }


def _material(question: str, later: str, given: str | None, find: Callable[[str], Found]) -> Found | None:
    def read(text: str) -> Found | None:
        found = find(text) if text.strip() else None
        if found:
            click.echo(f"  {found.text}", err=True)
        return found

    if given is not None:
        return read(given)
    answer: Found | None = _prompt(f"{question} ({later})", "", read)
    return answer


def _prompt(question: str, default: str, read: Callable[[str], Any]) -> Any:
    """Ask until the answer is good; what is wrong with one is said in the words of its error."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except LlmctlError as error:
            raise click.UsageError(error.message + (f" ({error.hint})" if error.hint else "")) from error

    return click.prompt(question, default=default, value_proc=checked, err=True, show_default=bool(default))


# -- writing ----------------------------------------------------------------------------------------------------------


def write(goal: Goal, name: str, directory: Path, data: Found | None, model: Found | None, *, force: bool) -> None:
    """Write the spec, and the schema beside it; say what is missing and how to go on."""
    from llmctl.starter.goals import render

    path = directory / f"{name}.yaml"
    if (path.exists() or path.is_symlink()) and not force:
        raise InputError(f"{path} exists", hint="choose another --name, or --force to replace it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        plan = render(goal, name, directory, data, model, schema=write_schema(directory))
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(plan.text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"wrote {path}")
    if plan.missing:
        click.echo("put in place first, or change the path in the spec:")
        for place, what in plan.missing.items():
            click.echo(f"  {directory / place}: {what}")
    for line in next_commands(path):
        click.echo(line)


def next_commands(path: Path) -> list[str]:
    """What to type now: check, try, run."""
    from llmctl.pipeline.next_steps import program_name

    program, spec = program_name(), shlex.quote(str(path))
    return [
        "next:",
        f"  {program} check {spec}",
        f"  {program} run {spec} --profile smoke",
        f"  {program} run {spec}",
    ]


def write_schema(directory: Path) -> str:
    """Write the JSON Schema of specs into the nearest `.llmctl` and return its path as seen from `directory`.

    Editors complete and check the spec with it.
    """
    from llmctl.registry import get_registry
    from llmctl.spec.schema import pipeline_schema
    from llmctl.store.layout import HOME

    here = directory.absolute()
    # A project that has one already keeps it: a second `.llmctl` further down would be a store of its own.
    home = next((parent for parent in (here, *here.parents) if (parent / HOME).is_dir()), here) / HOME
    home.mkdir(exist_ok=True)
    if not (home / ".gitignore").exists():
        (home / ".gitignore").write_text("*\n", encoding="utf-8")
    text = json.dumps(pipeline_schema(get_registry()), indent=1, ensure_ascii=False) + "\n"
    (home / "pipeline.schema.json").write_text(text, encoding="utf-8")
    relative = os.path.relpath(home, here)
    return f"{relative if relative.startswith('..') else f'./{relative}'}/pipeline.schema.json"
