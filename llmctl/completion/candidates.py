"""The candidates for the values of options and arguments. Each is a click `shell_complete` callback.

Everything is imported when a candidate is asked for: completing the name of a command must stay cheap. A callback may
raise; `protocol.respond` then offers nothing.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from llmctl.spec.resolved import Pipeline
    from llmctl.stage_command import StageCommand

Item = CompletionItem[str]
Callback = Callable[[click.Context, click.Parameter, str], list[Item]]
SPEC_SUFFIXES = (".yaml", ".yml")


def specs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """Shipped specs by name, and the YAML files there are."""
    from llmctl.spec.files import shipped

    return _starting(incomplete, [(name, "shipped spec") for name in shipped()]) + _paths(incomplete, SPEC_SUFFIXES)


def profiles(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """The profiles of the spec on the command line."""
    return _starting(incomplete, [(name, "") for name in _section(_spec(ctx), "profiles")])


def stages(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """The stages of the spec, and the instances of those that have a matrix."""
    pipeline = _pipeline(ctx)
    rows = {base: spec.stage.name for spec in pipeline.stages.values() if (base := spec.base or spec.id)}
    rows |= {spec.id: spec.stage.name for spec in pipeline.stages.values()}
    return _starting(incomplete, rows.items())


def sets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """`STAGE.` first, then `STAGE.PARAM=`, then the choices of that parameter; also variables and sources."""
    pipeline = _pipeline(ctx)
    used = {spec.base or spec.id: type(spec.params) for spec in pipeline.stages.values()}
    variables = [(f"vars.{name}=", "variable") for name in _section(_spec(ctx), "vars")]
    sources = [(f"sources.{name}.uri=", f"source, {source.type}") for name, source in pipeline.sources.items()]
    if "=" not in incomplete and "." not in incomplete:
        heads = [(f"{name}.", f"parameters of {name}") for name in used]
        heads += [(f"{word}.", word) for word, rows in (("vars", variables), ("sources", sources)) if rows]
        return _starting(incomplete, heads)
    stage, _, rest = incomplete.partition(".")
    if stage in used:
        return _assignments(used[stage], rest, f"{stage}.")
    return _starting(incomplete, variables + sources)


def artifacts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """Names in the store, ids after `sha256:`, and files where neither fits."""
    return _references(ctx, incomplete, ())


def _references(ctx: click.Context, incomplete: str, types: Iterable[str]) -> list[Item]:
    """Artifacts of these types (of any, without), else files."""
    from llmctl.store import names
    from llmctl.store.layout import Layout, locate

    given = ctx.params.get("store_path") or ctx.params.get("store")
    layout = Layout(locate(Path(given) if given else None))
    wanted = set(types)
    if incomplete.startswith("sha256:"):
        rows = [(f"sha256:{path.name}", "") for path in sorted(layout.root.glob("artifacts/sha256/??/*"))]
    else:
        found = {name: str(ref.get("type", "")) for name, ref in names.every(layout).items()}
        rows = [(name, kind) for name, kind in found.items() if not wanted or kind in wanted]
    return _starting(incomplete, rows) or [CompletionItem(incomplete, type="file")]


def seconds(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """The stages of a spec after that spec, artifacts after an artifact."""
    from llmctl.spec.files import shipped

    first = _spec(ctx)
    is_spec = first.endswith(SPEC_SUFFIXES) or first in shipped()
    return (stages if is_spec else artifacts)(ctx, param, incomplete)


def specs_and_artifacts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """What two words may begin with that are a spec and its stage, or two artifacts."""
    found = specs(ctx, param, incomplete)
    return found + [item for item in artifacts(ctx, param, incomplete) if item.type == "plain" or not found]


def installed(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """The installed stages; none where another kind was named that has no stage (`schema pipeline`)."""
    from llmctl.command_table import stage_order
    from llmctl.registry import get_registry

    found = get_registry().stages if ctx.params.get("kind", "stage") == "stage" else {}
    return _starting(incomplete, [(name, found[name].help) for name in stage_order(found)])


def _as_json(keys: Callback) -> Callback:
    """What `keys` offers for `KEY=VALUE`, with the values written as JSON."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        items = keys(ctx, param, incomplete.replace('"', ""))
        for item in items:
            key, sign, word = item.value.partition("=")
            if word not in ("", "true", "false"):
                item.value = f"{key}{sign}{json.dumps(word)}"
        return items

    return complete


def _as_file(keys: Callback) -> Callback:
    """The keys that `keys` offers; behind the `=` the files there are."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        key, sign, path = incomplete.partition("=")
        if not sign:
            return keys(ctx, param, incomplete)
        return [CompletionItem(f"{key}={item.value}") for item in _paths(path, ("",))]

    return complete


BY_NAME: Mapping[str, Callback] = {
    "spec": specs,
    "specs": specs,
    "profiles": profiles,
    "sets": sets,
    "set_jsons": _as_json(sets),
    "set_files": _as_file(sets),
    "to": stages,
    "until": stages,
    "start": stages,
    "artifact": artifacts,
    "artifacts": artifacts,
    "tag words": artifacts,
    "verify-resume stage": stages,
    "checkpoint stage": stages,
    "why first": specs_and_artifacts,
    "why second": seconds,
    "schema name": installed,
    "test stages": installed,
    "fit runs": artifacts,
    "plan measured": artifacts,
}
"""By the name of the parameter, or of its command and the parameter, for llmctl's own commands and its own plugins'."""


OWN = ("llmctl.", "llmctl_serve.", "llmctl_train_pretrain.")
"""Modules of the commands that `BY_NAME` is about."""


def attach(command: click.Command) -> None:
    """Give the parameters of a loaded command their candidates; those with their own `shell_complete` keep it."""
    from llmctl.stage_command import StageCommand

    if isinstance(command, StageCommand):
        _attach_stage(command)
        return
    if not (command.callback and command.callback.__module__.startswith(OWN)):
        return  # a third party's command: what its parameters mean is its own affair
    for param in command.params:
        callback = BY_NAME.get(f"{command.name} {param.name}") or BY_NAME.get(str(param.name))
        if callback is not None:
            _give(param, callback)


def _attach_stage(command: StageCommand) -> None:
    """A stage's ports take artifacts of their types, `--input` any of its ports, `--set` its parameters."""
    from llmctl.stage_flags import PORT

    stage = command.stage
    ports = {name: port.types for name, port in stage.inputs.items()}
    own = functools.partial(_parameters, stage.load_params())
    setting: Mapping[str, Callback] = {"sets": own, "set_jsons": _as_json(own), "set_files": _as_file(own)}
    for param in command.get_params(click.Context(command)):
        name = str(param.name)
        if name == PORT:
            _give(param, functools.partial(_inputs, ports))
        elif name.startswith(PORT):
            types = ports[name.removeprefix(PORT)]
            _give(param, functools.partial(_typed, types))
        elif name in setting:
            _give(param, setting[name])


def _typed(types: tuple[str, ...], ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    return _references(ctx, incomplete, types)


def _inputs(
    ports: Mapping[str, tuple[str, ...]], ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[Item]:
    """`PORT=`, then what fits that port."""
    port, sign, ref = incomplete.partition("=")
    if not sign:
        return _starting(incomplete, [(f"{name}=", " or ".join(types)) for name, types in ports.items()])
    items = _references(ctx, ref, ports.get(port, ()))
    for item in items:
        if item.type == "plain":
            item.value = f"{port}={item.value}"
    return items


def _parameters(model: Any, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    return _assignments(model, incomplete, "")


def _assignments(model: Any, typed: str, prefix: str) -> list[Item]:
    """`PARAM=` for every parameter of a model, those of nested models too; after the `=` the choices it has."""
    fields = dict(_fields(model.model_fields))
    name, sign, value = typed.partition("=")
    if not sign:
        rows = [(f"{prefix}{field}=", str(info.description or "")) for field, info in fields.items()]
        return _starting(prefix + typed, rows)
    return _starting(f"{prefix}{name}={value}", [(f"{prefix}{name}={word}", "") for word in _words(fields.get(name))])


def _fields(fields: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, info in fields.items():
        nested = getattr(info.annotation, "model_fields", None)
        if nested:
            yield from _fields(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def _words(info: Any) -> list[str]:
    """What a parameter of few values can be."""
    from llmctl.stage_flags import option_type

    kind = option_type(info) if info is not None else None
    if isinstance(kind, click.Choice):
        return [str(choice) for choice in kind.choices]
    return ["true", "false"] if kind is click.BOOL else []


def _give(param: click.Parameter, callback: Callback) -> None:
    """Let `callback` answer for a parameter, unless its author named another."""
    if param._custom_shell_complete is None:  # where click keeps the argument `shell_complete`; it has no setter
        param._custom_shell_complete = callback


def _spec(ctx: click.Context) -> str:
    """The spec on the command line; an option that still lacks its value makes click leave arguments unread."""
    given = [ctx.params.get("spec"), ctx.params.get("first"), *(ctx.params.get("specs") or ()), *ctx.args]
    return next(str(word) for word in given if word)  # without one there is nothing to offer: StopIteration ends it


def _pipeline(ctx: click.Context) -> Pipeline:
    """The spec with the profiles and values given so far. Raises SpecError."""
    from llmctl.registry import get_registry
    from llmctl.spec.options import settings
    from llmctl.spec.pipeline import load_pipeline

    given = [tuple(ctx.params.get(name) or ()) for name in ("profiles", "sets", "set_jsons", "set_files")]
    return load_pipeline(_spec(ctx), given[0], settings(*given[1:]), registry=get_registry())


def _section(spec: str, name: str) -> list[str]:
    """The keys of one section of a spec file, which need not be valid otherwise."""
    from llmctl.spec.files import find, read
    from llmctl.spec.nodes import Map

    section = read(find(spec)).get(name)
    return list(section.entries) if isinstance(section, Map) else []


def _starting(incomplete: str, rows: Iterable[tuple[str, str]]) -> list[Item]:
    return [CompletionItem(value, help=text or None) for value, text in rows if value.startswith(incomplete)]


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> list[Item]:
    """Directories (with a slash) and files with one of the suffixes; hidden ones once a dot is typed."""
    head, slash, tail = incomplete.rpartition("/")
    folder = Path(head + slash).expanduser() if slash else Path()
    found: list[Item] = []
    if not folder.is_dir():
        return found
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.name.startswith(tail) or (entry.name.startswith(".") and not tail.startswith(".")):
            continue
        if entry.is_dir():
            found.append(CompletionItem(f"{head}{slash}{entry.name}/"))
        elif entry.name.endswith(suffixes):
            found.append(CompletionItem(f"{head}{slash}{entry.name}"))
    return found
