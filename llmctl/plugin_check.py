"""What `llmctl plugins --check` finds in the installed plugins, without running any of them."""

from __future__ import annotations

import ast
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

import llmctl
from llmctl import PLUGIN_API, __version__
from llmctl.deprecation import deprecation_text
from llmctl.errors import MachineError
from llmctl.registry import GROUP, Plugin, Registry, discover, fits, normal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. A `note` is worth knowing, a `problem` makes the check fail."""

    level: Literal["problem", "note"]
    distribution: str
    where: str
    """The stage, command or entry point; empty if it is about the whole distribution."""
    text: str
    hint: str = ""


def check_plugins(format_: Literal["text", "json"] | str) -> int:
    """Print every finding; the exit code is 7 if one of them is a problem."""
    registry, found = examine()
    problems = [finding for finding in found if finding.level == "problem"]
    if format_ == "json":
        rows = [asdict(finding) for finding in found]
        click.echo(json.dumps({"plugin_api": PLUGIN_API, "findings": rows, "ok": not problems}, indent=2))
        return MachineError.exit_code if problems else 0
    for finding in found:
        click.echo(_line(finding))
    offers = sum(len(plugin.offers) for plugin in registry.plugins)
    counted = f"{len(registry.plugins)} plugins, {offers} stages and commands"
    click.echo(f"{counted}: {len(problems)} problem{'' if len(problems) == 1 else 's'}, plugin API {PLUGIN_API}")
    return MachineError.exit_code if problems else 0


def _line(finding: Finding) -> str:
    who = f"{finding.distribution}: " + (f"`{finding.where}`: " if finding.where else "")
    return f"{finding.level}: {who}{finding.text}" + (f"\n  hint: {finding.hint}" if finding.hint else "")


def examine() -> tuple[Registry, list[Finding]]:
    """Discover the plugins anew, noting what they warn about, and look at each of them."""
    with warnings.catch_warnings(record=True) as raised, contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("always", DeprecationWarning)
        registry = discover()
        usable = [plugin for plugin in registry.plugins if not (plugin.disabled or plugin.failure)]
        found = [*_refused(registry), *_twice(), *(finding for plugin in usable for finding in _look(plugin))]
    for dist in dict.fromkeys(plugin.dist_name for plugin in usable):
        found += _requirement(next(plugin for plugin in usable if plugin.dist_name == dist))
    found += _deprecated(usable, raised)
    order = {"problem": 0, "note": 1}
    return registry, sorted(found, key=lambda finding: (order[finding.level], finding.distribution, finding.where))


def _look(plugin: Plugin) -> Iterator[Finding]:
    """What is wrong with one plugin; imports the parameters of its stages."""
    from llmctl.stage_check import check_offers

    if not plugin.hooks:
        text, hint = "it implements no hook", "decorate the function: @hookimpl"
        yield Finding(level="problem", distribution=plugin.dist_name, where=plugin.name, text=text, hint=hint)
    yield from check_offers(plugin)


def _refused(registry: Registry) -> Iterator[Finding]:
    """Broken plugins and contested names, as the registry found them."""
    for name, why in registry.failures.items():
        dists = ", ".join(why.distributions)
        yield Finding(level="problem", distribution=dists, where=name, text=why.reason, hint=why.hint)


def _requirement(plugin: Plugin) -> Iterator[Finding]:
    """A plugin should say which llmctl it was written for, and mean this one."""
    dist, asked = plugin.dist_name, plugin.requires_llmctl
    if normal(dist) == "llmctl":
        return
    if asked is None or not asked:
        text = "it does not say which versions of llmctl it works with"
        yield Finding(level="note", distribution=dist, where="", text=text, hint=f'dependencies = ["{pinned()}"]')
    elif not fits(asked):
        text = f"{dist} {plugin.version} asks for llmctl{asked}, this is {__version__}"
        hint = f"install a version of {dist} for llmctl {__version__}, or an llmctl that is {asked}"
        yield Finding(level="problem", distribution=dist, where="", text=text, hint=hint)


def pinned(version: str = __version__) -> str:
    """The requirement that a plugin written for this llmctl should state: up to the next minor version."""
    major, minor = version.split(".")[:2]
    return f"llmctl>={version},<{major}.{int(minor) + 1}"


def _twice() -> Iterator[Finding]:
    """Distributions with plugins that lie on the path more than once: which one is used depends on the order."""
    from importlib.metadata import distributions

    places: dict[str, dict[str, str]] = {}
    for dist in distributions():
        if any(entry.group == GROUP for entry in dist.entry_points):
            folder = str(getattr(dist, "_path", dist.locate_file("")))
            places.setdefault(normal(dist.metadata["Name"] or ""), {})[folder] = dist.metadata["Version"] or "?"
    for name, found in places.items():
        if len(found) > 1:
            listed = ", ".join(f"{version} in {folder}" for folder, version in found.items())
            hint = f"pip uninstall {name}, as often as it says that it has, then install one"
            yield Finding(
                level="problem", distribution=name, where="", text=f"it is installed twice: {listed}", hint=hint
            )


def _deprecated(plugins: Sequence[Plugin], raised: Sequence[warnings.WarningMessage]) -> Iterator[Finding]:
    """What plugins use that is to go: what was warned about when they were imported, and what their files name."""
    for package, plugin in {plugin.package: plugin for plugin in reversed(plugins)}.items():
        files = {str(path): path for path in _files(package)}
        found = {
            (warning.filename, warning.lineno): str(warning.message) for warning in raised if warning.filename in files
        }
        for name, path in files.items():
            for line, text in _named(path):
                found.setdefault((name, line), text)
        for (name, line), text in sorted(found.items()):
            about = {"distribution": plugin.dist_name, "where": plugin.name}
            yield Finding(level="note", text=f"{text} ({name}:{line})", **about)


def _files(package: str) -> list[Path]:
    """The Python files of a package that is imported, or of a module."""
    module = sys.modules[package]
    roots = [Path(root) for root in getattr(module, "__path__", ())]
    return sorted(path for root in roots for path in root.rglob("*.py")) or [Path(str(module.__file__))]


def _named(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what to use instead) of the deprecated names of `llmctl` in a file, which is read and not imported."""
    if not llmctl._DEPRECATED:
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # whoever imports it is told
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "llmctl" and not node.level:
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llmctl":
            names = [node.attr]
        else:
            continue
        for name in names:
            if entry := llmctl._DEPRECATED.get(name):
                yield node.lineno, deprecation_text(f"llmctl.{name}", entry.instead, entry.removed_in)
