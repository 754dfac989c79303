"""`matrix` and `foreach`: the rows of a stage, each of which becomes an instance of it.

The grid, `include` and `exclude` are those of GitHub Actions: an `include` entry extends every row that it does not
contradict, and is a row of its own if there is none; `exclude` drops the rows that hold all of its values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import inf, isfinite, prod
from urllib.parse import quote

from llmctl.spec.diagnostics import Mark, Report, suggest
from llmctl.spec.interpolate import UNKNOWN, has_rows
from llmctl.spec.nodes import Map, Node, Scalar, Sequence

MOST_ROWS = 10_000
LONGEST_VALUE = 40
"""Characters of a value in an instance id; a longer one is cut and told apart by a digest."""
_RULES = ("include", "exclude")
_NAME = re.compile(r"[A-Za-z_][\w-]*\Z")


@dataclass(frozen=True)
class Row:
    """One combination of values. `id` is what stands between the brackets of the instance's id."""

    id: str
    values: Mapping[str, Scalar]


@dataclass(frozen=True)
class Family:
    """The rows of a stage; stages that follow its rows by `foreach` belong to it too."""

    root: str
    rows: tuple[Row, ...]


def row_order(id: str) -> tuple[tuple[str, float, str], ...]:
    """What rows are ordered by: their values in turn, numbers as numbers and before texts; 2 comes before 10."""
    pairs = (pair.partition("=") for pair in id.split(","))
    return tuple((key, _number(text), text) for key, _, text in pairs)


def _number(text: str) -> float:
    """Infinity for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return inf
    return value if isfinite(value) else inf


def families(stages: Mapping[str, Map], report: Report) -> dict[str, Family]:
    """The family of every stage that has rows. Reports E030, E031, E102 and E126; a stage with mistakes has none."""
    found: dict[str, Family] = {}
    for name, node in stages.items():
        if isinstance(matrix := node.get("matrix"), Map):
            rows = tuple(_rows(matrix, f"stages.{name}.matrix", report))
            if rows:
                found[name] = Family(name, rows)
    for name in stages:
        _follow(name, stages, found, report, ())
    return found


def _follow(
    name: str, stages: Mapping[str, Map], found: dict[str, Family], report: Report, open_: tuple[str, ...]
) -> None:
    """Give a stage with `foreach` the family of the stage that it names."""
    target = stages[name].get("foreach")
    if name in found or not isinstance(target, Scalar) or not isinstance(target.value, str):
        return
    if target.text in (*open_, name):
        report.add("E126", f"stages follow each other's rows: {' → '.join([*open_, name, target.text])}", target.mark)
    elif target.text not in stages:
        report.add("E122", f"no stage `{target.text}`", target.mark, suggest(target.text, list(stages), "stages"))
    else:
        _follow(target.text, stages, found, report, (*open_, name))
        if target.text in found:
            found[name] = found[target.text]
        elif not has_rows(stages[target.text]):
            hint = f"give `{target.text}` a matrix, or leave `foreach` out"
            report.add("E031", f"`foreach` of a stage without a matrix: `{target.text}`", target.mark, hint)


def _rows(matrix: Map, where: str, report: Report) -> Iterator[Row]:
    """The rows of one matrix, in the order of the grid and then of `include`."""
    axes = {key: entry.value for key, entry in matrix.entries.items() if key not in _RULES}
    for key in axes:
        if not _NAME.match(key):
            mark = matrix.entries[key].key
            report.add("E102", f"{where}: `{key}` is no name of a value", mark, "letters, digits, _ and -, as in lr")
            return
    values = {key: _axis(node, f"{where}.{key}", report) for key, node in axes.items()}
    if not all(values.values()):
        return
    if prod(map(len, values.values())) > MOST_ROWS:
        report.add("E002", f"{where}: more than {MOST_ROWS} rows", matrix.mark, "split the sweep into several specs")
        return
    grid = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())] if values else []
    excluded = list(_entries(matrix, "exclude", where, report))
    kept = [row for row in grid if not any(_matches(row, rule) for rule in excluded)]
    rows = list(_included(kept, set(values), list(_entries(matrix, "include", where, report))))
    if not rows:
        report.add("E102", f"{where} has no rows", matrix.mark, "give at least one key a list of values")
    seen: dict[str, Mark] = {}
    for id_keys, row in rows:
        id = ",".join(f"{key}={_shown(row[key])}" for key in id_keys)
        mark = next(iter(row.values())).mark
        if id in seen:
            report.add("E102", f"{where} has the row `{id}` twice", mark)
            continue
        seen[id] = mark
        yield Row(id, row)


def _axis(node: Node, where: str, report: Report) -> list[Scalar]:
    """The values of one key; empty after a report."""
    items = node.items if isinstance(node, Sequence) else ()
    if isinstance(node, Scalar) and node.value is UNKNOWN:
        return []
    if not items:
        problem = "an empty list gives no rows" if isinstance(node, Sequence) else "Input should be a list of values"
        report.add("E102", f"{where}: {problem}", node.mark, "write [1e-5, 3e-5]")
        return []
    wrong = next((item for item in items if not isinstance(item, Scalar) or item.value is None), None)
    if wrong is not None:
        report.add("E102", f"{where}: a value of a matrix is a number, a text or true or false", wrong.mark)
        return []
    return [item for item in items if isinstance(item, Scalar) and item.value is not UNKNOWN]


def _entries(matrix: Map, rule: str, where: str, report: Report) -> Iterator[Mapping[str, Scalar]]:
    """The maps of `include` or `exclude`."""
    node = matrix.get(rule)
    if node is None:
        return
    for item in node.items if isinstance(node, Sequence) else (node,):
        values = {key: entry.value for key, entry in item.entries.items()} if isinstance(item, Map) else {}
        scalars = {key: value for key, value in values.items() if isinstance(value, Scalar) and value.value is not None}
        if not scalars or len(scalars) < len(values):
            report.add("E102", f"{where}.{rule}: Input should be a list of maps of values", item.mark)
        elif not any(value.value is UNKNOWN for value in scalars.values()):
            yield scalars


def _matches(row: Mapping[str, Scalar], rule: Mapping[str, Scalar]) -> bool:
    return all(key in row and _same(row[key].value, value.value) for key, value in rule.items())


def _same(a: object, b: object) -> bool:
    """Equal values; `true` is not 1, as Python has it."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _included(
    grid: list[dict[str, Scalar]], axes: set[str], extra: list[Mapping[str, Scalar]]
) -> list[tuple[tuple[str, ...], dict[str, Scalar]]]:
    """(keys of the id, values) of every row: the grid's, extended where `include` fits, then those of its own."""
    rows = [(tuple(row), dict(row)) for row in grid]
    own: list[tuple[tuple[str, ...], dict[str, Scalar]]] = []
    for entry in extra:
        of_the_grid = {key: value for key, value in entry.items() if key in axes}
        fitting = [row for _, row in rows if _matches(row, of_the_grid)]
        for row in fitting:
            row.update(entry)
        if not fitting:
            own.append((tuple(entry), dict(entry)))
    return rows + own


def _shown(value: Scalar) -> str:
    """A value as it is written in an instance id: its source text, made fit for names of files."""
    text = quote(value.text, safe="+")
    if len(text) > LONGEST_VALUE or not text:
        text = f"{text[: LONGEST_VALUE - 9]}~{hashlib.sha256(value.text.encode()).hexdigest()[:8]}"
    return text
