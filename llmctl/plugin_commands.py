"""`llmctl plugins`: list what is installed, check it, start a plugin, test one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from llmctl.errors import UsageError
from llmctl.hookspecs import Command
from llmctl.registry import DISABLE, Failure, get_registry
from llmctl.stage import load_string

if TYPE_CHECKING:
    from llmctl.registry import Plugin, Registry

COMMANDS = (
    Command(name="new", help="Start a plugin: a small project that works.", target="llmctl.scaffold.commands:new"),
    Command(
        name="test", help="Test the stages of plugins against their contract.", target="llmctl.testing.commands:test"
    ),
)


class Plugins(click.Group):
    """The group: its commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help."""
        return [command.name for command in COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one command."""
        command = next((command for command in COMMANDS if command.name == cmd_name), None)
        return load_string(command.target) if command else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the declarations alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, command.help) for command in COMMANDS])


@click.group(cls=Plugins, invoke_without_command=True)
@click.option("--check", is_flag=True, help="Look for defects in what is installed; exit 7 if there is one.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print the list.")
@click.pass_context
def plugins(ctx: click.Context, check: bool, format_: str) -> int:
    """List the plugins: distribution, version, stages, commands, hooks and failures."""
    if ctx.invoked_subcommand is not None:
        for name, option in (("check", "--check"), ("format_", "--format")):
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                hint = f"llmctl plugins {option} …, or llmctl plugins {ctx.invoked_subcommand} …"
                raise UsageError(f"{option} has no effect on `{ctx.invoked_subcommand}`", hint=hint)
        return 0
    if check:
        from llmctl.plugin_check import check_plugins

        return check_plugins(format_)
    registry = get_registry()
    if format_ == "json":
        click.echo(json.dumps(describe(registry), indent=2))
    else:
        click.echo(listing(registry))
    return 0


def contested(registry: Registry) -> dict[str, Failure]:
    """The refused names that no single plugin is to blame for."""
    own = {id(plugin.failure) for plugin in registry.plugins}
    return {name: why for name, why in registry.failures.items() if id(why) not in own}


def describe(registry: Registry) -> dict[str, object]:
    """The list as plain JSON."""
    refused = [
        {"name": name, "reason": why.reason, "hint": why.hint, "distributions": why.distributions}
        for name, why in contested(registry).items()
    ]
    return {"plugins": [_record(plugin) for plugin in registry.plugins], "refused": refused}


def listing(registry: Registry) -> str:
    """The list for a person: a table, then what is broken or refused."""
    from llmctl.console import table

    headers = ("PLUGIN", "DISTRIBUTION", "VERSION", "STAGES", "COMMANDS", "HOOKS", "STATE")
    lines = [table(headers, [tuple(_row(plugin)) for plugin in registry.plugins])]
    problems = [(p.name, p.failure) for p in registry.plugins if p.failure] + list(contested(registry).items())
    lines += [f"\n{name}: {failure.reason}\n  hint: {failure.hint}" for name, failure in problems]
    if registry.unknown_disabled:
        lines.append(f"\n{DISABLE} names no installed plugin: {', '.join(registry.unknown_disabled)}")
    return "\n".join(lines)


def _record(plugin: Plugin) -> dict[str, object]:
    return {
        "name": plugin.name,
        "distribution": plugin.dist_name,
        "version": plugin.version,
        "stages": [stage.name for stage in plugin.stages],
        "commands": [command.name for command in plugin.commands],
        "hooks": list(plugin.hooks),
        "disabled": plugin.disabled,
        "failure": plugin.failure and plugin.failure.reason,
    }


def _row(plugin: Plugin) -> list[str]:
    record = _record(plugin)
    lists = [", ".join(record[key]) or "-" for key in ("stages", "commands", "hooks")]  # type: ignore[arg-type]  # str lists
    state = "disabled" if plugin.disabled else "broken" if plugin.failure else "ok"
    return [plugin.name, plugin.dist_name, plugin.version or "-", *lists, state]
