"""Runs from a table: CSV, JSON Lines or Parquet, one row per run, or several per run that make its curve."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmctl.errors import InputError, UsageError
from llmctl_train_pretrain.scaling.runs import Run, Runs, checked

ROLES: dict[str, tuple[str, ...]] = {
    "parameters": ("parameters", "params", "n"),
    "tokens": ("tokens", "d"),
    "loss": ("loss", "loss.validation"),
    "flops": ("flops", "compute", "c"),
    "run": ("run", "name"),
}
"""What a column may mean, and the names it is found by, in any case, unless `--column ROLE=NAME` says otherwise."""
SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".parquet")


def read_table(path: Path, columns: Mapping[str, str]) -> Runs:
    """The runs of a table. `columns` maps roles to names of columns.

    Needs `parameters`, `loss` and one of `tokens` and `flops`; the other follows from C = 6 N D. Rows with the same
    `run` are its curve, in any order; the one with the most tokens is its end.
    """
    rows = list(_records(path))
    if not rows:
        raise InputError(f"{path} has no rows")
    names = _names(path, rows[0][1], columns)
    curves: dict[str, list[Run]] = {}
    for where, row in rows:
        run = _run(where, row, names)
        curves.setdefault(run.name, []).append(run)
    found = []
    for points in curves.values():
        if len({run.parameters for run in points}) > 1:
            raise InputError(
                f"{path}: the rows of run `{points[0].name}` differ in `{names['parameters']}`",
                hint="a run has one size: give each a name of its own",
            )
        points.sort(key=lambda run: run.tokens)
        end = points[-1]
        curve = tuple((run.tokens, run.loss) for run in points) if len(points) > 1 else ()
        found.append(Run(end.name, end.parameters, end.tokens, end.loss, end.flops, curve))
    counts = f"column `{names['parameters']}`"
    return checked(found, counts, f"column `{names['flops']}`" if "flops" in names else "6ND")


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of every row."""
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path} is no table", hint=f"supported: {', '.join(SUFFIXES)}")
    from llmctl.text.datasets import read_lines, read_records

    if path.suffix != ".csv":
        for number, row in read_records(path):
            yield f"{path}:{number}", row
        return
    reader = csv.DictReader(text for _, text in read_lines(path))
    for row in reader:
        yield f"{path}:{reader.line_num}", row


def _names(path: Path, row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Role → column, for the roles that the table has."""
    has = {str(name).strip().lower(): str(name) for name in row}
    found = {}
    for role, usual in ROLES.items():
        if role in columns and columns[role] not in row:
            raise InputError(f"{path} has no column `{columns[role]}`", hint=f"it has: {', '.join(map(str, row))}")
        name = columns.get(role) or next((has[name] for name in usual if name in has), None)
        if name is not None:
            found[role] = name
    missing = [role for role in ("parameters", "loss") if role not in found]
    if not {"tokens", "flops"} & set(found):
        missing.append("tokens")
    if missing:
        raise InputError(
            f"{path} has no column for {' and '.join(missing)}; it has: {', '.join(map(str, row))}",
            hint=f'--column {missing[0]}="NAME OF THE COLUMN"',
        )
    return found


def _run(where: str, row: Mapping[str, Any], names: Mapping[str, str]) -> Run:
    numbers = {}
    for role in ("parameters", "tokens", "loss", "flops"):
        if role in names:
            numbers[role] = _number(where, names[role], row.get(names[role]))
    n = numbers["parameters"]
    tokens = numbers.get("tokens", numbers.get("flops", 0) / (6 * n))
    name = str(row.get(names["run"])) if "run" in names else where
    return Run(name, n, tokens, numbers["loss"], numbers.get("flops", 6 * n * tokens))


def _number(where: str, column: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: `{column}` is {value!r}, not a number") from None
    if not 0 < number < float("inf"):
        raise InputError(f"{where}: `{column}` is {value}, must be positive", hint="take the row out of the table")
    return number


def parse_columns(given: tuple[str, ...]) -> dict[str, str]:
    """`ROLE=NAME` of the command line; UsageError for an unknown role."""
    found = {}
    for text in given:
        role, equals, name = text.partition("=")
        if not equals or role not in ROLES:
            raise UsageError(f"--column {text}: not ROLE=NAME", hint=f"roles: {', '.join(ROLES)}")
        found[role] = name
    return found
