"""Which plugins are installed: each one loaded, registered and checked alone, so that none can hurt another.

Built-in stages come through the same entry-point group `llmctl` as third-party ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from llmctl import hookspecs
from llmctl.errors import BY_EXIT_CODE, InputError, LlmctlError, MachineError, UsageError
from llmctl.hookspecs import Command
from llmctl.stage import NAME, Stage, missing_module

if TYPE_CHECKING:
    from llmctl.generator import Generator
    from llmctl.stage import Artifact

GROUP = "llmctl"
DISABLE = "LLMCTL_DISABLE"
RESERVED = frozenset(
    ("check", "gc", "get", "lineage", "ls", "plan", "plugins", "pull", "push", "refs", "run", "show", "sign", "stage")
    + ("store", "tag", "verify", "why")
)
"""The names of llmctl's own commands (`llmctl.command_table`); a plugin cannot take one."""

HOOKS = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, "llmctl_spec"))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that is not available: a name that `--help` still shows, why, and the way out."""

    name: str
    reason: str
    hint: str
    exit_code: int
    distributions: tuple[str, ...] = ()

    def error(self) -> LlmctlError:
        """The error that using this name raises."""
        return BY_EXIT_CODE[self.exit_code](f"`{self.name}` is unavailable: {self.reason}", hint=self.hint)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a stage comes from, for action keys and manifests."""

    dist: str
    version: str
    editable: bool
    """Whether the code may change under the same version: an editable install, or a directory on the path."""
    source_digest: str = ""
    """`sha256:…` over the package's `.py` files; only for editable plugins other than llmctl (its stages use `rev`)."""


@dataclass(eq=False, kw_only=True)
class Plugin:
    """One entry point of the group `llmctl` and what came of it."""

    name: str
    target: str
    distribution: Distribution | None = field(repr=False)
    stages: tuple[Stage, ...] = ()
    commands: tuple[Command, ...] = ()
    hooks: tuple[str, ...] = ()
    failure: Failure | None = None
    disabled: bool = False

    @property
    def offers(self) -> tuple[Stage | Command, ...]:
        """Stages and commands together: both take a name on the command line."""
        return (*self.stages, *self.commands)

    @property
    def package(self) -> str:
        """The import package that the entry point names."""
        return self.target.partition(":")[0].partition(".")[0]

    @property
    def dist_name(self) -> str:
        """The name of the distribution; reads its METADATA, so start-up never asks for it."""
        return (self.distribution and self.distribution.metadata["Name"]) or "unknown"

    @property
    def version(self) -> str:
        """The version of the distribution, empty if it states none."""
        return (self.distribution and self.distribution.metadata["Version"]) or ""


class Registry:
    """Everything the installed plugins offer. Contested names are in `failures` and nowhere else."""

    def __init__(
        self, manager: pluggy.PluginManager, plugins: Iterable[Plugin], unknown_disabled: Sequence[str] = ()
    ) -> None:
        self.manager = manager
        self.unknown_disabled = tuple(unknown_disabled)
        """Names in `LLMCTL_DISABLE` that fit no installed plugin."""
        self.hook = manager.hook
        self.plugins = tuple(plugins)
        self.failures: dict[str, Failure] = {}
        """By the name that `--help` shows: a contested stage or command, or the entry point of a broken plugin."""
        for plugin in self.plugins:
            if plugin.failure:
                name = plugin.name if plugin.name not in self.failures else f"{plugin.name} ({plugin.dist_name})"
                self.failures[name] = plugin.failure
        self._owners: dict[str, Plugin] = {}
        offers = [(item.name, item, plugin) for plugin in self.plugins for item in plugin.offers]
        claims: dict[str, list[Plugin]] = {}
        for name, _, plugin in offers:
            claims.setdefault(name, []).append(plugin)
        self.failures |= {name: _contested(name, owners) for name, owners in claims.items() if len(owners) > 1}
        self.stages: dict[str, Stage] = {}
        self.commands: dict[str, Command] = {}
        for name, item, plugin in offers:
            if len(claims[name]) > 1:
                continue
            self._owners[name] = plugin
            if isinstance(item, Stage):
                self.stages[name] = item
            else:
                self.commands[name] = item

    def stage(self, name: str) -> Stage:
        """The stage called `name`; a contested or broken one raises its explanation, an unknown one UsageError."""
        if name in self.stages:
            return self.stages[name]
        if name in self.failures:
            raise self.failures[name].error()
        from difflib import get_close_matches

        near = get_close_matches(name, self.stages, 1)
        raise UsageError(f"no stage `{name}` is installed", hint=f"did you mean `{near[0]}`?" if near else None)

    def origin(self, stage_name: str) -> Origin:
        """Distribution, version and (for editable plugins) the source digest behind a stage."""
        plugin = self._owners[stage_name]
        name = plugin.dist_name
        editable = _is_editable(plugin.distribution)
        digest = _source_digest(plugin.package) if editable and name != "llmctl" else ""
        return Origin(dist=name, version=plugin.version, editable=editable, source_digest=digest)

    def open_generator(self, artifact: Artifact, **options: Any) -> Generator:
        """Open a model for generation with the first plugin that knows its type.

        Raises InputError if none does, MachineError with the install line if the opener's libraries are missing.
        """
        try:
            generator = self.hook.open_generator(artifact=artifact, options=options)
        except ModuleNotFoundError as error:
            raise missing_module(error, self._extra_of(error), f"opening `{artifact.path}`") from error
        if generator is None:
            raise InputError(
                f"nothing installed can generate from {artifact.path} ({artifact.type or 'unknown type'})",
                hint="give a model.hf or model.onnx directory; `llmctl plugins` lists who implements open_generator",
            )
        return generator  # type: ignore[no-any-return]  # pluggy's hooks are untyped

    def _extra_of(self, error: ModuleNotFoundError) -> str:
        """The extra of the plugin in whose code the import failed, found by the frames of the traceback."""
        packages = {plugin.package: plugin for plugin in self.plugins}
        trace, extra = error.__traceback__, ""
        while trace is not None:
            plugin = packages.get(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
            if plugin:
                extra = next((item.extra for item in plugin.offers if item.extra), extra)
            trace = trace.tb_next
        return extra


@cache
def get_registry() -> Registry:
    """The registry of this process; plugins are discovered once."""
    return discover()


def discover() -> Registry:
    """Load every entry point of the group, each in its own `try`; those in `LLMCTL_DISABLE` not at all."""
    manager = pluggy.PluginManager("llmctl")
    manager.add_hookspecs(hookspecs)
    disabled = {_normal(name) for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    plugins = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        plugin = Plugin(name=entry.name, target=entry.value, distribution=entry.dist)
        plugin.disabled = bool(disabled) and _normal(plugin.dist_name) in disabled
        if not plugin.disabled:
            _load(manager, plugin, entry)
        plugins.append(plugin)
    known = {_normal(plugin.dist_name) for plugin in plugins} if disabled else set()
    return Registry(manager, plugins, sorted(disabled - known))


def _load(manager: pluggy.PluginManager, plugin: Plugin, entry: EntryPoint) -> None:
    """Import, register, check and ask one plugin; whatever goes wrong becomes its `failure`."""
    loaded = None
    try:
        # A print at import time would corrupt the records on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            loaded = entry.load()
            if manager.is_registered(loaded):
                raise TypeError(f"{entry.value} is registered already, by another entry point")
            manager.register(loaded, name=f"{plugin.name}={plugin.target}@{id(plugin)}")
            manager.check_pending()
            plugin.hooks = tuple(sorted(caller.name for caller in manager.get_hookcallers(loaded) or ()))
            plugin.stages = tuple(_offers(manager, loaded, "register_stages", Stage))
            plugin.commands = tuple(_offers(manager, loaded, "register_commands", Command))
    except (Exception, SystemExit) as error:  # plugin code: anything may come out, and nothing may get past here
        with contextlib.suppress(Exception):
            manager.unregister(loaded)
        plugin.stages, plugin.commands = (), ()
        plugin.failure = _failure(plugin, error)


def _offers(manager: pluggy.PluginManager, loaded: object, hook: str, kind: type[Any]) -> list[Any]:
    """What the plugin's implementations of `hook` return, each item checked to be a `kind`."""
    items: list[Any] = []
    for impl in getattr(manager.hook, hook).get_hookimpls():
        if impl.plugin is not loaded:
            continue
        returned = impl.function()
        if not isinstance(returned, list | tuple):
            raise TypeError(f"{hook} must return a list of {kind.__name__}, it returned {_show(returned)}")
        for item in returned:
            if not isinstance(item, kind):
                raise TypeError(f"{hook} must return a list of {kind.__name__}, it holds {_show(item)}")
            if not NAME.match(item.name) or item.name in RESERVED:
                why = "is a command of llmctl" if item.name in RESERVED else f"must match {NAME.pattern}"
                raise TypeError(f"{hook}: the name {item.name!r} {why}")
        items.extend(returned)
    return items


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _failure(plugin: Plugin, error: BaseException) -> Failure:
    """Why a plugin could not be used, on one line, in the words of its own error."""
    text = " ".join(str(error).split())
    if isinstance(error, pluggy.PluginValidationError):
        text = _validation_text(text)
    elif isinstance(error, SyntaxError) and error.filename:
        text = f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    else:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    dist = plugin.dist_name
    return Failure(
        name=plugin.name,
        reason=f"the plugin `{plugin.target}` of {dist} {plugin.version} is broken: {text}",
        hint=f"repair or uninstall {dist}, or hide it with {DISABLE}={dist}",
        exit_code=MachineError.exit_code,
        distributions=(dist,),
    )


def _validation_text(text: str) -> str:
    """pluggy's message without the plugin's internal name, and with the nearest hook for a misspelled one."""
    unknown = re.match(r"unknown hook '(\w+)'", text)
    if not unknown:
        return re.sub(r"^Plugin '[^']*' ", "", text)
    from difflib import get_close_matches

    near = get_close_matches(unknown[1], HOOKS, 1)
    return f"unknown hook `{unknown[1]}`" + (f", did you mean `{near[0]}`?" if near else "")


def _contested(name: str, owners: list[Plugin]) -> Failure:
    dists = sorted({owner.dist_name for owner in owners})
    if len(dists) == 1:
        reason = f"{dists[0]} registers it more than once ({', '.join(owner.target for owner in owners)})"
        hint = f"uninstall or repair {dists[0]}, or hide it with {DISABLE}={dists[0]}"
    else:
        reason = f"registered by {' and by '.join(dists)}, so neither is used"
        third_party = [dist for dist in dists if dist != "llmctl"]
        hint = f"choose one: {' or '.join(f'{DISABLE}={dist}' for dist in third_party)} leaves that one out"
    return Failure(name=name, reason=reason, hint=hint, exit_code=UsageError.exit_code, distributions=tuple(dists))


def _normal(name: str) -> str:
    """A distribution name as packaging compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _is_editable(distribution: Distribution | None) -> bool:
    """True for `pip install -e`, and for a directory on the path that no installer recorded."""
    if distribution is None:
        return True
    direct = distribution.read_text("direct_url.json")
    if direct:
        import json

        return bool(json.loads(direct).get("dir_info", {}).get("editable"))
    return distribution.read_text("RECORD") is None


def _source_digest(package: str) -> str:
    """sha256 over the sorted relative paths and bytes of the package's `.py` files."""
    import hashlib
    from pathlib import Path

    module: ModuleType = sys.modules[package]
    roots = [Path(path) for path in getattr(module, "__path__", ())]
    files: Mapping[str, Path] = {
        path.relative_to(root).as_posix(): path for root in roots for path in root.rglob("*.py")
    } or {Path(str(module.__file__)).name: Path(str(module.__file__))}
    digest = hashlib.sha256()
    for name in sorted(files):
        content = hashlib.sha256(files[name].read_bytes()).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"
