"""docs/guarantees.md promises only what a test of that name holds, and every line of the three tables does."""

from __future__ import annotations

import re

import pytest

from .conftest import DOCS
from .test_features import missing_tests

TEXT = (DOCS / "guarantees.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")]
ROWS = [row for row in ROWS if row[0] not in ("Change", "Failure", "Code")]


def named(row: list[str]) -> list[str]:
    return re.findall(r"`([^`]+::test_\w+)`", row[-1])


def test_the_tables_have_all_their_lines():
    parts = [len(re.findall(r"^\| (?!Change|Failure|Code)", part, re.MULTILINE)) for part in TEXT.split("\n## ")[1:]]
    assert len(ROWS) == sum(parts) and parts == [15, 15, 12]


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_every_line_names_tests_that_exist(row):
    assert named(row)
    assert missing_tests(named(row)) == []


def test_a_test_that_is_gone_is_noticed():
    assert missing_tests(["store/test_gc.py::test_nothing_of_the_kind"])


def test_every_exit_code_has_a_line():
    from llmctl.errors import BY_EXIT_CODE
    from llmctl.launch.signals import CODES

    listed = {int(code) for row in ROWS for code in re.findall(r"^\d+|(?<=, )\d+$", row[0]) if row[0][0].isdigit()}
    assert listed == {*BY_EXIT_CODE, *CODES.values(), 0, 1, 124, 141}
