"""One command per stage, generated from its ports and its `Params` class when it is invoked.

Parameters of a simple type become flags, all others are set by `--set`; there is no second list of them. The command
makes a pipeline of one stage and runs it as `llmctl run` would: same store, same cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl import shell
from llmctl.errors import InputError, UsageError
from llmctl.registry import get_registry
from llmctl.spec.files import home_path, is_there
from llmctl.spec.options import settings
from llmctl.stage import In, Stage, missing_module
from llmctl.stage_flags import PARAM, PORT, by_set, common_options, flag_name, param_options, port_options

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from llmctl.launch.signals import Stop
    from llmctl.spec.resolved import Pipeline, Ref, StageSpec
    from llmctl.store import Store


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
                raise missing_module(error, self.stage, f"stage `{self.stage.name}`") from error
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


def run_stage_command(stage: Stage, values: Mapping[str, Any]) -> int:
    """Validate, say hello, read stdin, run, write references: the order of `pipeline.md` 3.3."""
    from llmctl.pipeline.commands import spec_store
    from llmctl.spec.pipeline import print_spec
    from llmctl.spec.user_config import chosen_log_format
    from llmctl.store import Store

    store = Store.open(Path(values["store"]) if values["store"] else None)
    values = {**values, "log_format": chosen_log_format(values["log_format"])}
    explicit, inputs = given_inputs(stage, values, store)
    piped = shell.is_pipe(shell.STDIN)
    build = spec_builder(stage, values, inputs)
    if values["print_spec"]:
        click.echo(print_spec(_piped(build(True))), nl=False)
        return 0
    pipeline = build(explicit or piped)
    if not values["store"] and (asked := spec_store(pipeline)):
        store = Store.open(asked)
    spec = _only(pipeline)
    explicit = explicit or any(_is_stdin(ref) for refs in spec.inputs.values() for ref in refs)
    reads = explicit or (piped and (bool(spec.unbound()) or not spec.inputs))
    stream = shell.open_stream(stage.name, values["format_"], values["log_format"])
    stream.hello(announced(spec), stdin=reads)
    if reads:
        pipeline = bind_upstream(pipeline, store, stream, build, explicit=explicit)
    stream.wait_for_reader()
    return execute(pipeline, store, stream, values)


def given_inputs(stage: Stage, values: Mapping[str, Any], store: Store) -> tuple[bool, list[str]]:
    """Whether stdin was asked for by `-`, and the inputs as `PORT=REF` with paths made absolute and names made ids."""
    rest = values["rest"]
    if any(word != "-" for word in rest):
        word = next(word for word in rest if word != "-")
        port = next(iter(stage.inputs), "PORT")
        raise UsageError(
            f"unexpected argument `{word}`",
            hint=f"give inputs as --{flag_name(port)} REF or --input {port}=REF; quote patterns: '*.md'",
        )
    pairs = list(values[PORT])
    for name in stage.inputs:
        value = values.get(PORT + name) or ()
        pairs += [f"{name}={ref}" for ref in ((value,) if isinstance(value, str) else value)]
    inputs = [_located(pair, store) for pair in pairs]
    return bool(rest) or any(pair.endswith("=-") for pair in inputs), inputs


def _located(pair: str, store: Store) -> str:
    """`PORT=REF` with a path that exists, or looks like a path or a pattern, counted from the current directory.

    What is no path but a name in the store, such as `quickstart/sft`, becomes the id that it stands for now.
    """
    from llmctl.store import names

    port, sign, ref = pair.partition("=")
    if not sign:
        raise UsageError(f"--input wants PORT=REF, got `{pair}`", hint="e.g. --input model=./base")
    path = home_path(ref)
    if not is_there(path) and names.candidates(store, ref):
        return f"{port}={names.read(store, ref)}"
    looks = ref.startswith(("./", "../", "/", "~")) or ref in (".", "..") or any(sign in ref for sign in "*?[/")
    if "://" in ref or not ref or ref == "-" or not (looks or is_there(path)):
        if ref and ref != "-" and not any(sign in ref for sign in (":", "@")):
            raise InputError(
                f"no such file or directory: {ref} (for input `{port}`)",
                hint="give a path, sha256:<id> or PIPELINE/STAGE",
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
            sets=settings(values["sets"], values["set_jsons"], values["set_files"]),
            flags={name: value for name, value in flags.items() if value is not None},
            output=values["output"] and str(Path.cwd() / home_path(values["output"])),
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

    return {port: spec.outputs[port] or possible(port) for port in stage.outputs if port in spec.outputs}


def bind_upstream(
    pipeline: Pipeline, store: Store, stream: shell.Stream, build: Callable[[bool], Pipeline], *, explicit: bool
) -> Pipeline:
    """Read stdin to its end and put the references into the open ports; raises what is missing."""
    from llmctl.upstream import Upstream, read_upstream

    spec = _only(pipeline)
    asked = {port for port, refs in spec.inputs.items() if any(_is_stdin(ref) for ref in refs)}
    closed = (set(spec.inputs) | set(spec.params.unused_inputs())) - asked
    open_ports: dict[str, In] = {name: port for name, port in spec.stage.inputs.items() if name not in closed}
    upstream = Upstream(open_ports, frozenset(asked | set(spec.unbound())))
    read_upstream(upstream, stream, explicit=explicit)
    bound = upstream.bind()
    if not upstream.records and spec.unbound():
        return build(False)  # an empty pipe is no pipe: the same message as without one
    refs = {port: tuple(_ref(found, store) for found in bound[port]) for port in bound}
    inputs = {port: refs.get(port) or spec.inputs.get(port) for port in spec.stage.inputs}
    return _replace(pipeline, inputs={port: value for port, value in inputs.items() if value})


def _ref(found: shell.Reference, store: Store) -> Ref:
    """By id if it lies in our store, else by its path: the two sides of a pipe may use different stores."""
    from llmctl.spec.resolved import IdRef, PathRef

    try:
        store.get(found.id)
    except InputError:
        if not found.path or not Path(found.path).exists():
            raise InputError(
                f"the artifact {found.id} from the pipe is not here: {found.path}", hint="run the upstream again"
            ) from None
        return PathRef(uri=found.path, type=found.type)
    return IdRef(id=found.id, type=found.type)


def execute(pipeline: Pipeline, store: Store, stream: shell.Stream, values: Mapping[str, Any]) -> int:
    """Run the one stage and write its references; a reader that is lost on the way costs no finished work."""
    from llmctl.pipeline.session import run_session

    def watch(stop: Stop) -> None:
        stops = values["stop_on_reader_exit"]
        if stream.lost() and stream.tell_lost(stops=stops) and stops:
            stop.request(shell.ReaderGone.exit_code)

    spec = _only(pipeline)
    options = {name: values[name] for name in ("events", "log_format", "on_busy", "grace")}
    result = run_session(pipeline, store, watch=watch, to=(spec.id,), **options)
    error = result.error()
    if error is not None:
        raise error
    outputs, uri = result.stages[spec.id].outputs, store.root.as_uri()
    stream.refs(
        shell.Reference(port=port, type=item.type, id=item.id, store=uri, path=str(item.path))
        for port in spec.stage.outputs
        if (item := outputs.get(port)) is not None
    )
    if stream.reader_gone:
        stream.tell_lost()
    return shell.ReaderGone.exit_code if stream.reader_gone else 0
