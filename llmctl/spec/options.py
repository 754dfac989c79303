"""Options of every command that reads a spec: which layers go on top of it, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

ERROR_FORMATS = ("text", "json")


def spec_layers(command: F) -> F:
    """`--profile`, `--set` in its three forms and `--error-format`; `settings` turns the values into layers."""
    for option in reversed((_profile, *set_options(), error_format_option())):
        command = option(command)
    return command


_profile = click.option(
    "--profile", "profiles", multiple=True, metavar="NAME", help="Put this profile on top; may be repeated."
)


def set_options(key: str = "STAGE.PARAM") -> tuple[Callable[[F], F], ...]:
    """`--set`, `--set-json` and `--set-file` as decorators; `key` is how the help calls what is set."""
    return (
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar=f"{key}=VALUE",
            help="Change a value; KEY+=VALUE appends to a list, KEY[0]=VALUE changes one of its items.",
        ),
        click.option(
            "--set-json", "set_jsons", multiple=True, metavar=f"{key}=JSON", help="Set a value written as JSON."
        ),
        click.option(
            "--set-file", "set_files", multiple=True, metavar=f"{key}=PATH", help="Set a value to what a file holds."
        ),
    )


def error_format_option() -> Callable[[F], F]:
    """`--error-format`. The program's edge reads it from the command line, since parsing itself may fail."""
    return click.option(
        "--error-format",
        type=click.Choice(ERROR_FORMATS),
        default="text",
        show_default=True,
        expose_value=False,
        help="How mistakes are told on stderr; json: one object per line.",
    )


def settings(sets: Iterable[str], set_jsons: Iterable[str] = (), set_files: Iterable[str] = ()) -> tuple[Any, ...]:
    """The settings of a command line, low to high: `--set`, then `--set-json`, then `--set-file`."""
    from llmctl.spec.overrides import Setting

    given = (("--set", sets), ("--set-json", set_jsons), ("--set-file", set_files))
    return tuple(Setting(option, text) for option, texts in given for text in texts)
