"""`llmctl plugins test`: run the conformance kit on the stages of installed distributions, or record their defaults."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import click

from llmctl.errors import LlmctlError, StageError, UsageError
from llmctl.registry import Plugin, Registry, get_registry, normal
from llmctl.stage import Stage
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
    path = file or Path(baseline.NAME)
    found = PluginFile.read(path) if path.is_file() or (file and not record) else None
    registry = get_registry()
    chosen = choose(registry, distributions, found)
    if record:
        return record_defaults(registry, chosen, found, path)
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
        _no_stage(registry, chosen, stages)
    if format_ == "json":
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(f"{len(rows)} checks, {failed} failed")
    return StageError.exit_code if failed else 0


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


def _no_stage(registry: Registry, chosen: Sequence[str], only: Sequence[str]) -> NoReturn:
    known = [stage.name for dist in chosen for plugin in _plugins(registry, dist) for stage in plugin.stages]
    listed = ", ".join(chosen)
    if only and known:
        near = get_close_matches(only[0], known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"it has: {', '.join(known)}"
        raise UsageError(f"{listed} has no stage `{only[0]}`", hint=hint)
    raise UsageError(f"{listed} has no stage to test", hint="`llmctl plugins` lists what it has")


def record_defaults(registry: Registry, chosen: Sequence[str], file: PluginFile | None, path: Path) -> int:
    """Write what the stages promise now. StageError, and nothing is written, if one broke its promise without `rev`."""
    if len(chosen) != 1:
        raise UsageError("--record writes the file of one distribution", hint="llmctl plugins test --record DIST")
    dist = chosen[0]
    if file and normal(file.distribution) != normal(dist):
        raise UsageError(f"{path} is that of `{file.distribution}`, not of `{dist}`", hint="give another --file")
    file = file or PluginFile(path, dist)
    stages = [stage for plugin in _plugins(registry, dist) for stage in plugin.stages]
    recorded = {stage.name: baseline.describe(stage) for stage in stages}
    for name, new in recorded.items():
        old = file.recorded.get(name)
        status, reason = baseline.compare(old, new) if old else ("ok", "")
        if status == "failed":
            raise StageError(f"`{name}` is not recorded: {reason}", hint=f"nothing was written to {path}")
    changed = [name for name in recorded if recorded[name] != file.recorded.get(name)]
    file.recorded = recorded
    file.write()
    click.echo(f"{path}: {len(recorded)} stages of {dist}, {len(changed)} changed")
    return 0
