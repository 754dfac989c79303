"""docs/features.md claims a feature only with a command that exists and tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from llmctl.command_table import CORE
from llmctl.registry import get_registry

from .conftest import DOCS, ROOT

ROW = re.compile(
    r"^\| (?P<id>[A-Z]\d+) \| (?P<system>[^|]+) \| (?P<commands>[^|]+) \| (?P<tests>[^|]+) \|$", re.MULTILINE
)
DONE, PARTLY = (DOCS / "features.md").read_text(encoding="utf-8").split("## Partly there")
ROWS = {match["id"]: match for match in ROW.finditer(DONE)}


@cache
def functions_in(path: Path) -> set[str]:
    """Names of the test functions of a file; nothing is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def missing_tests(names: list[str]) -> list[str]:
    """Those of `path::name` that are not there."""
    found = [(name, ROOT / "tests" / name.partition("::")[0]) for name in names]
    return [name for name, path in found if not path.is_file() or name.partition("::")[2] not in functions_in(path)]


def test_there_are_rows_and_every_line_of_the_table_is_one():
    lines = [line for line in DONE.splitlines() if line.startswith("| ") and not line.startswith("| Id ")]
    assert len(ROWS) == len(lines) > 10


@pytest.mark.parametrize("id", ROWS)
def test_every_test_named_exists(id):
    names = codes(ROWS[id]["tests"])
    assert names
    assert missing_tests(names) == []


def test_a_test_that_does_not_exist_is_noticed():
    assert missing_tests(["nn/test_parity.py::test_no_such_thing", "nn/no_such_file.py::test_theirs_to_ours"]) != []
    assert missing_tests(["nn/test_parity.py::test_theirs_to_ours"]) == []


@pytest.mark.parametrize("id", ROWS)
def test_every_command_named_exists(id):
    known = {*get_registry().stages, *get_registry().commands, *(command.name for command in CORE)}
    commands = codes(ROWS[id]["commands"])
    assert commands
    assert set(commands) <= known


def test_no_feature_is_both_done_and_partly_there():
    partly = re.findall(r"^\| ([A-Z]\d+) \|", PARTLY, re.MULTILINE)
    assert partly
    assert len(set(partly)) == len(partly)
    assert not set(partly) & set(ROWS)
