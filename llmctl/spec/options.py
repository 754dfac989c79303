"""Options of every command that reads a spec: which layers go on top of it, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from llmctl.spec.overrides import Setting

Row = tuple[tuple[str, ...], Mapping[str, Any]]
"""The names of an option and what click takes beside them."""


def set_rows(key: str) -> tuple[Row, ...]:
    """`--set`, `--set-json`, `--set-file` and `--error-format`; `key` is how the help calls what is set."""
    many: Mapping[str, Any] = {"multiple": True}
    change = "Change a value; KEY+=VALUE appends to a list, KEY[0]=VALUE changes an item of it."
    formats = click.Choice(["text", "json"])
    return (
        (("--set", "sets"), {**many, "metavar": f"{key}=VALUE", "help": change}),
        (("--set-json", "set_jsons"), {**many, "metavar": f"{key}=JSON", "help": "Set a value written as JSON."}),
        (("--set-file", "set_files"), {**many, "metavar": f"{key}=PATH", "help": "Set a value to what a file holds."}),
        (
            ("--error-format",),
            # The program's edge reads it from the words as typed, since parsing itself may fail.
            {"type": formats, "expose_value": False, "help": "How errors are told on stderr; json: a line for each."},
        ),
    )


_PROFILE: Row = (
    ("--profile", "profiles"),
    {"multiple": True, "metavar": "NAME", "help": "Put this profile on top; may be repeated."},
)


def spec_layers(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--profile`, `--set` in its three forms and `--error-format`; `command` gets `profiles` and all of `sets`."""

    @wraps(command)
    def call(*args: Any, sets: Iterable[str], set_jsons: Iterable[str], set_files: Iterable[str], **values: Any) -> Any:
        return command(*args, sets=settings(sets, set_jsons, set_files), **values)

    layered: Callable[..., Any] = call
    for names, details in reversed((_PROFILE, *set_rows("STAGE.PARAM"))):
        layered = click.option(*names, **details)(layered)
    return layered


def settings(sets: Iterable[str], set_jsons: Iterable[str], set_files: Iterable[str]) -> tuple[Setting, ...]:
    """The settings of a command line, low to high: `--set`, then `--set-json`, then `--set-file`."""
    from llmctl.spec.overrides import Setting

    given = (("--set", sets), ("--set-json", set_jsons), ("--set-file", set_files))
    return tuple(Setting(option, text) for option, texts in given for text in texts)
