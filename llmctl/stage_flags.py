"""The options of a stage command, made from the stage's ports and its `Params` class."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl import shell
from llmctl.spec.options import set_rows
from llmctl.stage import Stage

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

PARAM, PORT = "param__", "port__"
"""Prefixes of the names under which click gives the values of parameters and input ports."""
RESERVED = frozenset(
    ("config", "set", "input", "output", "print-spec", "format", "store", "events", "cache", "on-busy", "help")
    + ("stop-on-reader-exit", "log-format", "set-json", "set-file", "error-format", "grace")
)
"""Flags of every stage command; a parameter or port of that name is reached by `--set` or `--input`."""


class ParamOption(click.Option):
    """A flag whose absence means "not given", although its help names the default that the parameter has."""

    def __init__(self, *args: Any, stated: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stated = stated

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Click's own extra (the range), and the parameter's default."""
        extra = super().get_help_extra(ctx)
        if self.stated not in (None, ""):
            extra["default"] = str(self.stated).lower() if isinstance(self.stated, bool) else str(self.stated)
        return extra


def port_options(stage: Stage, fields: Mapping[str, Any]) -> list[click.Parameter]:
    """`--model REF` for every input port whose name is free, and the generic `--input PORT=REF`, `-`."""
    options: list[click.Parameter] = []
    taken = RESERVED | {flag_name(name) for name in fields}
    for name, port in stage.inputs.items():
        if flag_name(name) not in taken:
            help_ = f"{port.help or ', '.join(port.types)}{'' if port.optional else '  [required unless piped]'}"
            options.append(
                click.Option([f"--{flag_name(name)}", PORT + name], metavar="REF", multiple=port.many, help=help_)
            )
    generic = "Bind an input: a path, sha256:<id>, name@tag, or - for stdin; may be repeated."
    options.append(click.Option(["-i", "--input", "port__"], metavar="PORT=REF", multiple=True, help=generic))
    options.append(
        click.Argument(["rest"], nargs=-1, metavar="[-]", help="Read references from stdin, and insist on it.")
    )
    return options


def param_options(fields: Mapping[str, FieldInfo]) -> list[click.Parameter]:
    """A flag for each parameter of a simple type: bool as `--x/--no-x`, choices listed, bounds shown and checked."""
    options: list[click.Parameter] = []
    for name, info in fields.items():
        kind = option_type(info)
        flag = flag_name(name)
        if kind is None or flag in RESERVED:
            continue
        names = [f"--{flag}/--no-{flag}" if kind is click.BOOL else f"--{flag}", PARAM + name]
        stated = "required" if info.is_required() else _plain(info.get_default())
        options.append(ParamOption(names, type=kind, default=None, stated=stated, help=info.description))
    return options


def option_type(info: FieldInfo) -> click.ParamType[Any] | None:
    """The click type of a parameter, None if it is no scalar. `None` beside one other type is left aside."""
    kinds = [kind for kind in _members(info.annotation) if kind is not type(None)]
    literals = [value for kind in kinds if typing.get_origin(kind) is typing.Literal for value in typing.get_args(kind)]
    if literals and len(kinds) == 1:
        return click.Choice([str(value) for value in literals])
    kinds = [kind for kind in kinds if typing.get_origin(kind) is not typing.Literal]
    if any(kind not in (bool, int, float, str, Path) for kind in kinds):
        return None
    if len(kinds) > 1 or literals:
        return click.STRING
    if kinds[0] is bool:
        return click.BOOL
    if kinds[0] in (int, float):
        return _number(kinds[0], info.metadata)
    return click.STRING


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _number(kind: type, metadata: Sequence[Any]) -> click.ParamType[Any]:
    """A range type from pydantic's constraints `ge gt le lt`."""
    bounds = {
        name: value
        for item in metadata
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(item, name, None)) is not None
    }
    if not bounds:
        return click.INT if kind is int else click.FLOAT
    ranged: click.ParamType[Any] = (click.IntRange if kind is int else click.FloatRange)(
        min=bounds.get("ge", bounds.get("gt")),
        max=bounds.get("le", bounds.get("lt")),
        min_open="gt" in bounds,
        max_open="lt" in bounds,
    )
    ranged.name = "integer" if kind is int else "float"  # the help says `x>=1` beside it; "integer range" reads badly
    return ranged


def by_set(fields: Mapping[str, FieldInfo], prefix: str = "") -> list[tuple[str, str]]:
    """Help rows of the parameters that have no flag; a nested model gives a row for each of its own."""
    rows = []
    for name, info in fields.items():
        if not prefix and option_type(info) is not None and flag_name(name) not in RESERVED:
            continue
        nested = getattr(info.annotation, "model_fields", None)
        if nested:
            rows += by_set(nested, f"{prefix}{name}.")
            continue
        default = None if info.is_required() else _plain(info.get_default(call_default_factory=True))
        stated = "required" if info.is_required() else "" if default in (None, "[]", "") else f"default: {default}"
        rows.append((prefix + name, f"{info.description or ''}{f'  [{stated}]' if stated else ''}"))
    return rows


def _plain(value: Any) -> Any:
    """A default as one would type it."""
    if isinstance(value, list | tuple | set | frozenset):
        return f"[{', '.join(str(_plain(item)) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    return value


def flag_name(name: str) -> str:
    """`vocab_size` is `--vocab-size`."""
    return name.replace("_", "-")


def common_options() -> list[click.Parameter]:
    """What every stage command takes."""
    from llmctl.launch.stopping import GRACE
    from llmctl.spec.resolved import CACHE_MODES

    path = click.Path(path_type=Path)
    return [
        click.Option(["-c", "--config"], type=path, metavar="FILE", help="A single-stage spec; flags and --set win."),
        *(click.Option(names, **details) for names, details in set_rows("NAME")),
        click.Option(["-o", "--output"], metavar="DIR", help="Also copy the result here."),
        click.Option(["--print-spec"], is_flag=True, help="Print this command as a spec file, run nothing."),
        click.Option(
            ["--format", "format_"],
            type=click.Choice(shell.FORMATS),
            default="auto",
            show_default=True,
            help="What stdout gets: references for the next stage, a line for a person, the path or the id.",
        ),
        click.Option(["--store"], metavar="DIR", help="The store; by default that of the nearest .llmctl directory."),
        click.Option(
            ["--events"], metavar="FILE|fd:N", envvar="LLMCTL_EVENTS", help="Also write events as JSON lines."
        ),
        click.Option(
            ["--log-format"],
            type=click.Choice(["text", "json"]),
            envvar="LLMCTL_LOG_FORMAT",
            help="What stderr gets: lines for a person, or the events as JSON lines.",
        ),
        click.Option(["--cache"], type=click.Choice(CACHE_MODES), help="auto: reuse; off: do not look; refresh: redo."),
        click.Option(
            ["--on-busy"],
            type=click.Choice(["wait", "fail", "run"]),
            default="wait",
            show_default=True,
            help="When another process does the same work.",
        ),
        click.Option(
            ["--grace"],
            type=click.FloatRange(min=0),
            default=GRACE,
            show_default=True,
            metavar="SECONDS",
            help="How long it may take for a checkpoint when it is to stop.",
        ),
        click.Option(["--stop-on-reader-exit"], is_flag=True, help="Stop when the next command of the pipe ends."),
    ]
