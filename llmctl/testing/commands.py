"""`llmctl plugins test`: run the conformance kit on the stages of installed distributions, or record their defaults."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from llmctl.errors import LlmctlError, StageError, UsageError
from llmctl.registry import Plugin, Registry, get_registry, normal
from llmctl.stage import Stage
from llmctl.stage_check import say
from llmctl.testing import baseline
from llmctl.testing.baseline import PluginFile
from llmctl.testing.conformance import CHECKS, Check, Outcome, subject
from llmctl.testing.subjects import KILLS


@click.command()
@click.argument("distributions", nargs=-1, metavar="[DIST]...")
@click.option("--stage", "stages", multiple=True, metavar="NAME", help="Only this stage; may be repeated.")
@click.option(
    "--only",
    "names",
    multiple=True,
    type=click.Choice([str(check) for check in CHECKS]),
    help="Only this check; may be repeated.",
)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Examples and recorded defaults.  [default: ./{baseline.NAME}]",
)
@click.option("--record", is_flag=True, help="Write the defaults of now to FILE, test nothing.")
@click.option(
    "--kills", type=click.IntRange(1, 100), default=KILLS, show_default=True, help="How often to kill a stage."
)
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print results.")
def test(
    distributions: tuple[str, ...],
    stages: tuple[str, ...],
    names: tuple[str, ...],
    file: Path | None,
    record: bool,
    kills: int,
    format_: str,
) -> int:
    """Test every stage of the installed distributions DIST against its contract; exit 3 if a check fails.

    Without DIST: the distribution that FILE names, else every installed one but llmctl.
    """
    if record:
        _record_alone()
    path = file or Path(baseline.NAME)
    found = PluginFile.read(path) if path.is_file() or (file and not record) else None
    registry = get_registry()
    chosen = choose(registry, distributions, found)
    if record:
        return record_defaults(registry, chosen, found, path)
    if file and found and normal(found.distribution) not in map(normal, chosen):
        raise UsageError(f"{path} is that of `{found.distribution}`, which is not tested", hint="give another --file")
    _known_stages(registry, chosen, stages)
    checks = [check for check in CHECKS if not names or check.name in names]
    rows = []
    for dist in chosen:
        fitting = found if found and normal(found.distribution) == normal(dist) else None
        for stage, outcome in outcomes(registry, dist, fitting, checks, stages, kills):
            rows.append({"distribution": dist, "stage": stage, **asdict(outcome)})
            if format_ == "text":
                click.echo(line(stage, outcome))
    failed = sum(row["status"] == "failed" for row in rows)
    if not rows:
        raise UsageError(f"{', '.join(chosen)} has no stage to test", hint="`llmctl plugins` lists what it has")
    if format_ == "json":
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(f"{len(rows)} checks, {failed} failed")
    return StageError.exit_code if failed else 0


def _record_alone() -> None:
    """UsageError for an option that says what to test, beside `--record`, which tests nothing."""
    ctx = click.get_current_context()
    for name, option in (("stages", "--stage"), ("names", "--only"), ("kills", "--kills"), ("format_", "--format")):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option} has no effect beside --record", hint="it records every stage and tests nothing")


def line(stage: str, outcome: Outcome) -> str:
    """`ok      demo  commit` and the reason behind it."""
    word = {"ok": "ok", "failed": "FAILED", "not applicable": "-"}[outcome.status]
    return f"{word:<6}  {stage}  {outcome.check:<11}  {outcome.reason}".rstrip()


def choose(registry: Registry, distributions: Sequence[str], file: PluginFile | None) -> list[str]:
    """The names of the distributions to test, as they write themselves. UsageError for one without plugins."""
    installed = {normal(plugin.dist_name): plugin.dist_name for plugin in registry.plugins}
    if not distributions:
        own = [file.distribution] if file and file.distribution else []
        distributions = own or [name for key, name in installed.items() if key != "llmctl"]
    if not distributions:
        raise UsageError(
            "no plugin but llmctl's own is installed", hint="name a distribution: llmctl plugins test DIST"
        )
    for name in distributions:
        if normal(name) not in installed:
            near = get_close_matches(normal(name), installed, 1)
            hint = f"did you mean `{near[0]}`?" if near else "install it first: pip install -e ."
            raise UsageError(f"no plugin of the distribution `{name}` is installed", hint=hint)
    return list(dict.fromkeys(installed[normal(name)] for name in distributions))


def outcomes(
    registry: Registry,
    dist: str,
    file: PluginFile | None,
    checks: Sequence[Check],
    only: Sequence[str],
    kills: int,
) -> Iterator[tuple[str, Outcome]]:
    """(stage, outcome) of every check, as they end. A broken plugin and a contested stage are failures too."""
    for plugin in _plugins(registry, dist):
        if plugin.failure and not only:
            yield plugin.name, Outcome(check="load", status="failed", reason=plugin.failure.reason)
        for stage in plugin.stages:
            if only and stage.name not in only:
                continue
            if registry.stages.get(stage.name) is not stage:
                reason = registry.failures[stage.name].reason
                yield stage.name, Outcome(check="load", status="failed", reason=reason)
                continue
            for outcome in _stage_outcomes(stage, file, checks, kills):
                yield stage.name, outcome
    if file and not only:
        yield from _strays(_plugins(registry, dist), dist, file)


def _strays(plugins: Sequence[Plugin], dist: str, file: PluginFile) -> Iterator[tuple[str, Outcome]]:
    """(name, outcome) of what the file says about stages that the distribution does not offer, which tests nothing."""
    if not plugins or any(plugin.failure for plugin in plugins):
        return  # what it offers is not known
    known = {stage.name for plugin in plugins for stage in plugin.stages}
    for name, sections in file.mentioned().items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            reason = f"{file.path} has {' and '.join(sections)} of `{name}`, which is no stage of {dist}"
            reason += f"; did you mean `{near[0]}`?" if near else ""
            yield name, Outcome(check="file", status="failed", reason=reason)


def _stage_outcomes(stage: Stage, file: PluginFile | None, checks: Sequence[Check], kills: int) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory(prefix="llmctl-test-") as folder:
        try:
            found = subject(stage, file, Path(folder) / "inputs")
        except LlmctlError as error:
            reason = error.message + (f" ({error.hint})" if error.hint else "")
            yield Outcome(check="examples", status="failed", reason=reason)
            return
        found = replace(found, kills=kills, record_file=found.record_file or "")
        for check in checks:
            yield check(found, Path(folder))


def _plugins(registry: Registry, dist: str) -> list[Plugin]:
    return [plugin for plugin in registry.plugins if plugin.dist_name == dist and not plugin.disabled]


def _known_stages(registry: Registry, chosen: Sequence[str], only: Sequence[str]) -> None:
    """UsageError for a `--stage` that none of the chosen distributions has."""
    plugins = [plugin for dist in chosen for plugin in _plugins(registry, dist)]
    known = [stage.name for plugin in plugins for stage in plugin.stages]
    for name in only:
        if name not in known:
            near = get_close_matches(name, known, 1)
            broken = next((plugin.failure.reason for plugin in plugins if plugin.failure), "")
            hint = f"did you mean `{near[0]}`?" if near else broken or f"it has: {', '.join(known) or 'none'}"
            raise UsageError(f"{', '.join(chosen)} has no stage `{name}`", hint=hint)


def record_defaults(registry: Registry, chosen: Sequence[str], file: PluginFile | None, path: Path) -> int:
    """Write what the stages promise now.

    StageError, and nothing is written, if one broke its promise without `rev`, or cannot be asked, or is gone.
    """
    if len(chosen) != 1:
        raise UsageError("--record writes the file of one distribution", hint="llmctl plugins test --record DIST")
    dist = chosen[0]
    if file and normal(file.distribution) != normal(dist):
        raise UsageError(f"{path} is that of `{file.distribution}`, not of `{dist}`", hint="give another --file")
    file = file or PluginFile(path, dist)
    plugins = _plugins(registry, dist)
    unwritten = f"nothing was written to {path}"
    for plugin in plugins:
        if plugin.failure:
            raise StageError(f"{dist} is not recorded: {plugin.failure.reason}", hint=unwritten)
    recorded = {stage.name: _promise(stage, unwritten) for plugin in plugins for stage in plugin.stages}
    if not recorded:
        raise UsageError(f"{dist} has no stage to record", hint="`llmctl plugins` lists what it has")
    if gone := sorted(set(file.recorded) - set(recorded)):
        hint = f"{unwritten}; if it is gone for good, remove its entry there by hand"
        raise StageError(f"`{gone[0]}` is recorded, and {dist} does not offer it any more", hint=hint)
    for name, new in recorded.items():
        old = file.recorded.get(name)
        status, reason = baseline.compare(old, new) if old else ("ok", "")
        if status == "failed":
            raise StageError(f"`{name}` is not recorded: {reason}", hint=unwritten)
    changed = [name for name in recorded if recorded[name] != file.recorded.get(name)]
    file.recorded = recorded
    file.write()
    click.echo(f"{path}: {len(recorded)} stages of {dist}, {len(changed)} changed")
    return 0


def _promise(stage: Stage, unwritten: str) -> dict[str, Any]:
    """What a stage promises; StageError if its parameters cannot be imported."""
    try:
        return baseline.describe(stage)
    except (Exception, SystemExit) as error:  # a plugin's import
        text = f"`{stage.params}` cannot be imported: {say(error)}"
        raise StageError(f"`{stage.name}` is not recorded: {text}", hint=unwritten) from error
