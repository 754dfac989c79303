"""`llmctl gc`: see what nothing needs any more, and let go of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import click

from llmctl.store.collection import Collection, Item, collect, empty_trash, plan
from llmctl.store.commands import format_option, print_as, store_option
from llmctl.store.layout import is_store
from llmctl.store.reachable import Depth, Rules
from llmctl.store.store import Store

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
PLURAL = {
    "key": "keys of results that are gone",
    "record": "records of artifacts that are gone",
    "signature": "signatures of artifacts that are gone",
    "request": "requests that were done",
    "lock": "files of locks that guard nothing",
    "run": "directories of old runs",
    "external": "notes on inputs that nothing was made from",
    "tmp": "leftovers of processes that died",
    "trash": "trash of earlier collections",
}


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in click's stubs only
    """`7d`, `12h`, `30m`, `90s`, `2w` as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of seconds."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", str(value))
        if not match:
            self.fail(f"`{value}` is no duration, write 7d, 12h, 30m or 90s", param, ctx)
        return float(match[1]) * UNITS[match[2]]


class Days(click.FloatRange):
    """A number; `nan` is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of days."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"`{value}` is no number of days", param, ctx)
        return number


@click.command()
@click.option("--apply", "really", is_flag=True, help="Do it: move it to trash/ in the store.")
@click.option("--grace", type=Duration(), default="7d", show_default=True, help="How long things lie in the trash.")
@click.option("--now", "at_once", is_flag=True, help="Leave nothing in the trash, whatever --grace says.")
@click.option("--keep-days", type=Days(min=0), default=30, show_default=True, help="Keep results of younger runs.")
@click.option(
    "--keep-runs", type=click.IntRange(min=0), default=20, show_default=True, help="Keep results of the last runs."
)
@click.option(
    "--keep-lineage",
    type=click.Choice(["none", "inputs", "all"]),
    default="inputs",
    show_default=True,
    help="Also keep what the kept was made from (inputs), and all that was made along with it (all).",
)
@store_option
@format_option
def gc(
    really: bool,
    grace: float,
    at_once: bool,
    keep_days: float,
    keep_runs: int,
    keep_lineage: str,
    store_path: Path | None,
    format_: str,
) -> None:
    """Show what in the store nothing needs any more; with --apply, throw it away.

    Kept are the results that names, tags, recent runs, running stages and other projects point at, and what was
    committed or used within a day.
    """
    store = Store.open(store_path)
    grace = 0.0 if at_once else grace
    rules = Rules(days=keep_days, runs=keep_runs, lineage=cast(Depth, keep_lineage))
    if really and is_store(store.root):
        store.create()
        found = collect(store, rules, grace=grace)
        if at_once:
            empty_trash(store)
    else:
        found = plan(store, rules, grace=grace)
    print_as(format_, _record(found, really, at_once), lambda: _text(found, really, at_once))


def _record(found: Collection, really: bool, at_once: bool) -> dict[str, Any]:
    rows = [
        {
            "kind": i.kind, "id": i.id, "type": i.type, "stage": i.stage, "bytes": i.bytes, "path": str(i.path),
            "deleted": i.final or at_once,
        }
        for i in found.items
    ]  # fmt: skip
    projects = [{"directory": p.directory, "host": p.host, "gone": p.gone} for p in found.projects]
    return {"applied": really, "items": rows, "bytes": found.bytes, "kept": found.kept, "projects": projects}


def _groups(items: Sequence[Item]) -> list[tuple[str, str, int, int]]:
    """(what, stage, how many, bytes), artifacts by type and stage first, largest first."""
    groups: dict[tuple[bool, str, str], list[Item]] = {}
    for item in items:
        if item.kind == "artifact":
            key = (False, item.type, item.stage or "-")
        elif item.kind == "work":
            key = (True, f"checkpoints and other state of {item.type} work", "-")
        else:
            key = (True, PLURAL[item.kind], "-")
        groups.setdefault(key, []).append(item)
    rows = [(key, len(found), sum(item.bytes for item in found)) for key, found in groups.items()]
    rows.sort(key=lambda row: (row[0][0], -row[2], row[0]))
    return [(key[1], key[2], count, total) for key, count, total in rows]


def _text(found: Collection, really: bool, at_once: bool) -> str:
    from llmctl.console import human_bytes, table

    lines = []
    if found.items:
        cells = [(what, stage, count, human_bytes(total)) for what, stage, count, total in _groups(found.items)]
        lines += [table(("WHAT", "STAGE", "COUNT", "SIZE"), cells), ""]
    for project in found.projects:
        lines += [_gone(project.directory, project.folder)] if project.gone else []
    kept = f"{found.kept} artifact{'' if found.kept == 1 else 's'} stay"
    if not found.items:
        lines.append(f"nothing to collect, {kept}")
    elif really:
        lines.append(f"{_went(found.items, at_once)}; {kept}")
    else:
        lines.append(f"{human_bytes(found.bytes)} would go, {kept}; nothing was touched: add --apply")
    return "\n".join(lines)


def _went(items: Sequence[Item], at_once: bool) -> str:
    """How much was moved to the trash, and how much was deleted."""
    from llmctl.console import human_bytes

    moved = [item.bytes for item in items if not (item.final or at_once)]
    deleted = [item.bytes for item in items if item.final or at_once]
    parts = [f"{human_bytes(sum(moved))} moved to the trash"] if moved else []
    parts += [f"{human_bytes(sum(deleted))} deleted"] if deleted else []
    empties = "; `llmctl gc --apply --now` empties it" if moved else ""
    return f"{', '.join(reversed(parts))}{empties}"


def _gone(directory: str, folder: Path) -> str:
    return f"{directory} used this store and is no more; its results are kept until {folder} is deleted"
