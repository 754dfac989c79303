"""What can be said about a declaration before anybody uses it: its texts, types, targets, parameters and flags."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.hookspecs import Command
from llmctl.registry import Plugin
from llmctl.stage import Stage

if TYPE_CHECKING:
    from pydantic import BaseModel

    from llmctl.plugin_check import Finding

SENTENCE = re.compile(r"[^a-z\s].*[.!?]\Z")
NEXT_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)[.!?]\s+[A-Z]")
TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z")
SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
"""Expressions whose names are their own."""
OPEN = {"*", "__getattr__"}
"""What a module that binds other names than those in its source binds: a star import, a function for the others."""
NEAR = 0.85
"""A type this similar to one of llmctl's, and not equal to it, is taken for a slip."""


def check_offers(plugin: Plugin) -> Iterator[Finding]:
    """The findings about every stage and command of one plugin."""
    from llmctl.plugin_check import Finding

    for offer in plugin.offers:
        about: dict[str, Any] = {"distribution": plugin.dist_name, "where": offer.name}
        faults = stage_faults(offer) if isinstance(offer, Stage) else command_faults(offer)
        for text, hint in [*faults, *_extra_faults(plugin, offer)]:
            yield Finding(level="problem", text=text, hint=hint, **about)
        if isinstance(offer, Stage):
            for text, hint in hidden_flags(offer):
                yield Finding(level="note", text=text, hint=hint, **about)


Fault = tuple[str, str]
"""What is wrong, and the way out."""


def say(error: BaseException) -> str:
    """The kind of an error and its text, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def stage_faults(stage: Stage) -> Iterator[Fault]:
    """Everything that is wrong with a stage's declaration; imports its `params.py`, never its `run.py`."""
    yield from _help_faults(stage.help)
    yield from _type_faults(stage)
    for port, out in stage.outputs.items():
        if out.same_as and out.same_as not in stage.inputs:
            yield f"output `{port}` is the same as `{out.same_as}`, which is no input", _near(out.same_as, stage.inputs)
    if not isinstance(stage.rev, int) or isinstance(stage.rev, bool) or stage.rev < 1:
        yield f"rev is {stage.rev!r}", "it is a number from 1 on"
    for field in ("headline", "key_deps"):
        if isinstance(getattr(stage, field), str):
            yield f"{field} is a text, not a tuple of texts", f"write ({getattr(stage, field)!r},)"
    yield from _run_faults(stage)
    yield from _params_faults(stage)


def command_faults(command: Command) -> Iterator[Fault]:
    """Everything that is wrong with a command's declaration."""
    yield from _help_faults(command.help)
    _, faults = _definition(command.target, "target")
    yield from faults


def _help_faults(text: str) -> Iterator[Fault]:
    if not SENTENCE.match(text) or NEXT_SENTENCE.search(text) or "\n" in text:
        yield f"help is not one sentence: {text!r}", "one line, a capital letter first, a full stop last"


def _type_faults(stage: Stage) -> Iterator[Fault]:
    """Types that look like a slip of one of llmctl's; others are a plugin's own."""
    from difflib import get_close_matches

    from llmctl.store.types import TYPES

    declared = {type for port in stage.inputs.values() for type in port.types}
    declared |= {port.type for port in stage.outputs.values() if port.type}
    for type in sorted(declared - set(TYPES)):
        if near := get_close_matches(type, TYPES, 1, NEAR):
            yield f"there is no type `{type}`", f"did you mean `{near[0]}`?"


def _extra_faults(plugin: Plugin, offer: Stage | Command) -> Iterator[Fault]:
    """An extra that neither the plugin's distribution nor llmctl has would be an install line that does nothing."""
    from importlib.metadata import metadata

    if offer.extra and offer.extra not in plugin.extras:
        if offer.extra in (metadata("llmctl").get_all("Provides-Extra") or ()):
            return
        known = ", ".join(plugin.extras) or "none"
        yield f"{plugin.dist_name} has no extra `{offer.extra}`", f"its extras: {known}"


# -- import strings ---------------------------------------------------------------------------------------------------


def _definition(target: str, field: str) -> tuple[ast.AST | None, list[Fault]]:
    """The statement that defines what an import string names, found in the source without running it."""
    if not TARGET.match(target):
        return None, [(f"{field} is {target!r}", 'an import string is "package.module:name"')]
    module, _, name = target.partition(":")
    try:
        spec = find_spec(module)
    except (Exception, SystemExit) as error:  # it imports the parents of the module: plugin code
        return None, [(f"{field}: `{module}` cannot be found: {say(error)}", "")]
    if spec is None or spec.origin is None:
        return None, [(f"{field}: there is no module `{module}`", "is its file part of the wheel?")]
    if not spec.origin.endswith(".py"):
        return None, []  # compiled: nothing to read
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except SyntaxError as error:
        return None, [(f"{field}: {spec.origin}:{error.lineno}: {error.msg}", "")]
    defined = dict(_names(tree.body))
    if name not in defined:
        if OPEN & set(defined):
            return None, []  # what else it has shows only when it is imported
        return None, [(f"{field}: `{module}` defines no `{name}`", _near(name, defined))]
    return defined[name], []


def _names(body: Iterable[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """(name, what binds it) of the names that statements bind, those in the blocks of other statements included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                yield node.id, node
        elif not isinstance(node, SCOPES):
            yield from _names(ast.iter_child_nodes(node))


def _run_faults(stage: Stage) -> Iterator[Fault]:
    """`run` must be there and take the context, the parameters and one keyword for every input port."""
    found, faults = _definition(stage.run, "run")
    yield from faults
    if not isinstance(found, ast.FunctionDef):
        return
    arguments = found.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    keywords = set(names[2:]) | {argument.arg for argument in arguments.kwonlyargs}
    if len(names) < 2 and not arguments.vararg:
        yield f"run: `{stage.run}` takes no context and parameters", "def run(ctx, params, **inputs)"
    elif not arguments.kwarg:
        for port in stage.inputs:
            if port not in keywords:
                yield f"run: `{stage.run}` has no argument for the input `{port}`", ""
        optional = len(arguments.defaults)
        required = set(names[2 : len(names) - optional]) | {
            a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None
        }
        for name in sorted(required - set(stage.inputs)):
            yield f"run: the argument `{name}` of `{stage.run}` is no input port", _near(name, stage.inputs)


def _near(name: str, known: Mapping[str, Any]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1)
    return f"did you mean `{near[0]}`?" if near else ""


# -- parameters -------------------------------------------------------------------------------------------------------


def _params_faults(stage: Stage) -> Iterator[Fault]:
    _, faults = _definition(stage.params, "params")
    if faults:
        yield from faults
        return
    try:
        model = stage.load_params()
    except (Exception, SystemExit) as error:  # a plugin's import
        yield f"params: `{stage.params}` cannot be imported: {say(error)}", ""
        return
    from llmctl.spec.params import Params

    if not (isinstance(model, type) and issubclass(model, Params)):
        yield f"params: `{stage.params}` is no class of parameters", "derive it from llmctl.Params"
        return
    for name in undescribed(model):
        yield f"the parameter `{name}` has no description", 'Field(…, description="…") is what --help shows'
    yield from _flag_clashes(stage, model)
    yield from _port_faults(stage, model)


def undescribed(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The parameters without a description, those of nested models with their path."""
    for name, info in model.model_fields.items():
        if not (info.description or "").strip():
            yield prefix + name
        for nested in nested_models(info.annotation):
            yield from undescribed(nested, f"{prefix}{name}.")


def nested_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The model classes that stand in a type."""
    from typing import get_args

    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from nested_models(argument)


def _port_faults(stage: Stage, model: type[BaseModel]) -> Iterator[Fault]:
    """What names ports may only name declared ones; asked for the defaults, if there are any."""
    try:
        params: Any = model()
        ports = params.outputs()
        named = {"required_inputs": params.required_inputs(), "unused_inputs": params.unused_inputs()}
    except (Exception, SystemExit):  # a parameter without a default, or plugin code that needs more than defaults
        return
    for method, found in named.items():
        for port in sorted(set(found or ()) - set(stage.inputs)):
            yield f"{method}() of its parameters names `{port}`, which is no input", _near(port, stage.inputs)
    for port in sorted(set(ports or ()) - set(stage.outputs)):
        yield f"outputs() of its parameters names `{port}`, which is no output", _near(port, stage.outputs)


def _flags(stage: Stage, model: type[BaseModel]) -> list[tuple[str, str]]:
    """(flag, what it is for) of everything that would like to be an option of the stage's command."""
    from click import BOOL

    from llmctl.stage_flags import flag_name, option_type

    flags = []
    for name, info in model.model_fields.items():
        kind = option_type(info)
        if kind is not None:
            flags.append((flag_name(name), f"the parameter `{name}`"))
        if kind is BOOL:
            flags.append((f"no-{flag_name(name)}", f"the parameter `{name}`, switched off"))
    return flags + [(flag_name(port), f"the input `{port}`") for port in stage.inputs]


def _flag_clashes(stage: Stage, model: type[BaseModel]) -> Iterator[Fault]:
    owners: dict[str, list[str]] = {}
    for flag, owner in _flags(stage, model):
        owners.setdefault(flag, []).append(owner)
    for flag, names in owners.items():
        if len(names) > 1:
            yield f"--{flag} would be {' and '.join(names)}", "rename one of them"


def hidden_flags(stage: Stage) -> Iterator[Fault]:
    """Parameters and ports whose flag every stage command has already; they are reached by `--set` or `--input`."""
    from llmctl.stage_flags import RESERVED, flag_name

    module, _, name = stage.params.partition(":")
    model = getattr(sys.modules.get(module), name, None)  # None if its import failed, which is reported
    for name in getattr(model, "model_fields", {}):
        if flag_name(name) in RESERVED:
            yield f"--{flag_name(name)} is an option of every stage", f"the parameter is reached by --set {name}=…"
    for port in stage.inputs:
        if flag_name(port) in RESERVED:
            yield f"--{flag_name(port)} is an option of every stage", f"the input is reached by --input {port}=…"
