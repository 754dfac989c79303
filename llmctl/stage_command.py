"""One command per stage, generated from its ports and its `Params` class when it is invoked.

Parameters of a simple type become flags, all others are set by `--set`; there is no second list of them. The command
makes a pipeline of one stage and runs it as `llmctl run` would: same store, same cache.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl import shell
from llmctl.errors import InputError, UsageError
from llmctl.registry import get_registry
from llmctl.stage import In, Stage, missing_module

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from llmctl.spec.resolved import Pipeline, Ref, StageSpec
    from llmctl.store import Store

PARAM, PORT = "param__", "port__"
RESERVED = frozenset(
    ("config", "set", "input", "output", "print-spec", "format", "store", "events", "cache", "on-busy", "help")
    + ("stop-on-reader-exit",)
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


class StageCommand(click.Command):
    """`llmctl STAGE`: scalar parameters and input ports as flags, everything else by `--set`; records on stdout."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._built = False
        self._by_set: list[tuple[str, str]] = []
        super().__init__(stage.name, help=stage.help, callback=self._callback)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Build the options when they are needed: this imports the stage's `params.py`, and pydantic with it."""
        if not self._built:
            self._built = True
            try:
                fields: Mapping[str, FieldInfo] = self.stage.load_params().model_fields
            except ModuleNotFoundError as error:
                raise missing_module(error, self.stage.extra, f"stage `{self.stage.name}`") from error
            self.params = [*port_options(self.stage, fields), *param_options(fields), *common_options()]
            self._by_set = by_set(fields)
        return super().get_params(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Inputs, parameters, parameters that only `--set` reaches, options."""
        groups: dict[str, list[tuple[str, str]]] = {"Inputs": [], "Parameters": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                name = str(param.name)
                title = (
                    "Inputs"
                    if name.startswith(PORT) or name == "rest"
                    else "Parameters"
                    if name.startswith(PARAM)
                    else "Options"
                )
                groups[title].append(record)
        sections = {
            "Inputs": groups["Inputs"],
            "Parameters": groups["Parameters"],
            "Parameters given by --set NAME=VALUE": self._by_set,
            "Outputs": [(port, out.type or f"as {out.same_as}") for port, out in self.stage.outputs.items()],
            "Options": groups["Options"],
        }
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def _callback(self, **values: Any) -> int:
        return run_stage_command(self.stage, values)


# -- options ----------------------------------------------------------------------------------------------------------


def port_options(stage: Stage, fields: Mapping[str, Any]) -> list[click.Parameter]:
    """`--model REF` for every input port whose name is free, and the generic `--input PORT=REF`, `-`."""
    options: list[click.Parameter] = []
    taken = RESERVED | {_flag(name) for name in fields}
    for name, port in stage.inputs.items():
        if _flag(name) not in taken:
            help_ = f"{port.help or ', '.join(port.types)}{'' if port.optional else '  [required unless piped]'}"
            options.append(
                click.Option([f"--{_flag(name)}", PORT + name], metavar="REF", multiple=port.many, help=help_)
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
        flag = _flag(name)
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
        if not prefix and option_type(info) is not None and _flag(name) not in RESERVED:
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


def _flag(name: str) -> str:
    return name.replace("_", "-")


def common_options() -> list[click.Parameter]:
    """What every stage command takes."""
    from llmctl.spec.resolved import CACHE_MODES

    path = click.Path(path_type=Path)
    return [
        click.Option(["-c", "--config"], type=path, metavar="FILE", help="A single-stage spec; flags and --set win."),
        click.Option(
            ["--set", "sets"], multiple=True, metavar="NAME=VALUE", help="Set any parameter; may be repeated."
        ),
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
        click.Option(["--cache"], type=click.Choice(CACHE_MODES), help="auto: reuse; off: do not look; refresh: redo."),
        click.Option(
            ["--on-busy"],
            type=click.Choice(["wait", "fail", "run"]),
            default="wait",
            show_default=True,
            help="When another process does the same work.",
        ),
        click.Option(["--stop-on-reader-exit"], is_flag=True, help="Stop when the next command of the pipe ends."),
    ]


# -- one invocation ---------------------------------------------------------------------------------------------------


def run_stage_command(stage: Stage, values: Mapping[str, Any]) -> int:
    """Validate, say hello, read stdin, run, write references: the order of `pipeline.md` 3.3."""
    from llmctl.spec.pipeline import print_spec

    explicit, inputs = given_inputs(stage, values)
    piped = shell.is_pipe(shell.STDIN)
    build = spec_builder(stage, values, inputs)
    if values["print_spec"]:
        click.echo(print_spec(_piped(build(True))), nl=False)
        return 0
    pipeline = build(explicit or piped)
    spec = _only(pipeline)
    explicit = explicit or any(_is_stdin(ref) for refs in spec.inputs.values() for ref in refs)
    reads = explicit or (piped and (bool(spec.unbound()) or not spec.inputs))
    stream = shell.open_stream(stage.name, values["format_"])
    stream.hello(announced(spec), stdin=reads)
    if reads:
        pipeline = bind_upstream(pipeline, stream, build, values["store"], explicit=explicit)
    stream.wait_for_reader()
    return execute(pipeline, stream, values)


def given_inputs(stage: Stage, values: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether stdin was asked for by `-`, and the inputs as `PORT=REF` with paths made absolute."""
    rest = values["rest"]
    if any(word != "-" for word in rest):
        word = next(word for word in rest if word != "-")
        port = next(iter(stage.inputs), "PORT")
        raise UsageError(
            f"unexpected argument `{word}`",
            hint=f"give inputs as --{_flag(port)} REF or --input {port}=REF; quote patterns: '*.md'",
        )
    pairs = list(values[PORT])
    for name in stage.inputs:
        value = values.get(PORT + name) or ()
        pairs += [f"{name}={ref}" for ref in ((value,) if isinstance(value, str) else value)]
    inputs = [_absolute(pair) for pair in pairs]
    return bool(rest) or any(pair.endswith("=-") for pair in inputs), inputs


def _absolute(pair: str) -> str:
    """`PORT=REF` with a path that exists, or looks like a path or a pattern, counted from the current directory."""
    port, sign, ref = pair.partition("=")
    if not sign:
        raise UsageError(f"--input wants PORT=REF, got `{pair}`", hint="e.g. --input model=./base")
    path = Path(ref).expanduser()
    looks = ref.startswith(("./", "../", "/", "~")) or ref in (".", "..") or any(sign in ref for sign in "*?[/")
    if "://" in ref or not ref or ref == "-" or not (looks or path.exists()):
        if ref and ref != "-" and not any(sign in ref for sign in (":", "@")):
            raise InputError(
                f"no such file or directory: {ref} (for input `{port}`)", hint="give a path or sha256:<id>"
            )
        return pair
    return f"{port}={Path.cwd() / path}"


def spec_builder(stage: Stage, values: Mapping[str, Any], inputs: Sequence[str]) -> Callable[[bool], Pipeline]:
    """A function of "may inputs still come from stdin" that reads and validates this command line as a spec."""
    from llmctl.spec.pipeline import single_stage

    flags = {key.removeprefix(PARAM): value for key, value in values.items() if key.startswith(PARAM)}

    def build(stdin: bool) -> Pipeline:
        pipeline = single_stage(
            stage,
            file=values["config"],
            inputs=inputs,
            sets=values["sets"],
            flags={name: value for name, value in flags.items() if value is not None},
            output=values["output"] and str(Path.cwd() / Path(values["output"]).expanduser()),
            stdin=stdin,
            registry=get_registry(),
        )
        return _replace(pipeline, cache=values["cache"]) if values["cache"] else pipeline

    return build


def _only(pipeline: Pipeline) -> StageSpec:
    (spec,) = pipeline.stages.values()
    return spec


def _replace(pipeline: Pipeline, **changes: Any) -> Pipeline:
    spec = dataclasses.replace(_only(pipeline), **changes)
    return dataclasses.replace(pipeline, stages={spec.id: spec})


def _piped(pipeline: Pipeline) -> Pipeline:
    """The same with `-` at every required input that is still open."""
    from llmctl.spec.resolved import StdinRef

    spec = _only(pipeline)
    return _replace(pipeline, inputs={**spec.inputs, **{port: (StdinRef(),) for port in spec.unbound()}})


def _is_stdin(ref: Ref) -> bool:
    from llmctl.spec.resolved import StdinRef

    return isinstance(ref, StdinRef)


def announced(spec: StageSpec) -> dict[str, str]:
    """The outputs to come with their types; where an input decides, all that it may be, joined with `|`."""
    stage = spec.stage

    def possible(port: str) -> str:
        return "|".join(stage.inputs[stage.outputs[port].same_as].types)

    return {port: kind or possible(port) for port, kind in spec.outputs.items()}


def bind_upstream(
    pipeline: Pipeline,
    stream: shell.Stream,
    build: Callable[[bool], Pipeline],
    store_path: str | None,
    *,
    explicit: bool,
) -> Pipeline:
    """Read stdin to its end and put the references into the open ports; raises what is missing."""
    spec = _only(pipeline)
    asked = {port for port, refs in spec.inputs.items() if any(_is_stdin(ref) for ref in refs)}
    open_ports: dict[str, In] = {n: p for n, p in spec.stage.inputs.items() if n in asked or n not in spec.inputs}
    upstream = shell.Upstream(open_ports, frozenset(asked | set(spec.unbound())))
    shell.read_upstream(upstream, stream, explicit=explicit)
    bound = upstream.bind()
    if not upstream.records and spec.unbound():
        return build(False)  # an empty pipe is no pipe: the same message as without one
    refs = {port: tuple(_ref(found, store_path) for found in bound[port]) for port in bound}
    inputs = {port: refs.get(port) or spec.inputs.get(port) for port in spec.stage.inputs}
    return _replace(pipeline, inputs={port: value for port, value in inputs.items() if value})


def _ref(found: shell.Reference, store_path: str | None) -> Ref:
    """By id if it lies in our store, else by its path: the two sides of a pipe may use different stores."""
    from llmctl.spec.resolved import IdRef, PathRef
    from llmctl.store import Store

    try:
        Store.open(store_path and Path(store_path)).get(found.id)
    except InputError:
        if not found.path or not Path(found.path).exists():
            raise InputError(
                f"the artifact {found.id} from the pipe is not here: {found.path}", hint="run the upstream again"
            ) from None
        return PathRef(uri=found.path, type=found.type)
    return IdRef(id=found.id, type=found.type)


def execute(pipeline: Pipeline, stream: shell.Stream, values: Mapping[str, Any]) -> int:
    """Run the one stage and write its references."""
    raise NotImplementedError


def open_store(path: str | None) -> Store:
    """The store given by `--store`, else that of the nearest `.llmctl`."""
    from llmctl.store import Store

    return Store.open(path and Path(path))
