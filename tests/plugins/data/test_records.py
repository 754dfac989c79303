"""Rows as records: they take no rule for prose, keep every digit, and hold values of any type."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmctl import Artifact
from llmctl.testing import StageResult, run_stage
from llmctl.text.datasets import read_rows
from llmctl_data import DATA
from llmctl_data.records import record_to_text, text_to_record

PLAIN = {"emit": ["text"], "validation_share": 0.0, "workers": 1}
RECORD = {"sources": [{"path": "*", "rows": "record"}]}
PROSE = [{"name": "unicode", "white_space": "collapse"}, {"name": "boilerplate"}, {"name": "quality"}]


def read(root: Path, out: Path, **params: Any) -> StageResult:
    return run_stage(DATA, out, {**PLAIN, **params}, files=[Artifact(root, "files")])


def rows(result: StageResult) -> list[dict[str, Any]]:
    return sorted(read_rows(result.outputs["text"], "train"), key=lambda row: row["id"])


def rejects(result: StageResult) -> dict[str, str]:
    lines = (result.outputs["metrics"].path / "rejects.jsonl").read_text().splitlines()
    return {told["where"]: told["detail"] for told in map(json.loads, lines)}


def test_records_pass_the_rules_for_prose(tmp_path: Path) -> None:
    """Quality would drop them, white space would be collapsed, a mis-decoded name repaired."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.csv").write_text("name,note\nsch\u00c3\u00b6n,two  blanks \nHome,\n")
    result = read(tmp_path / "raw", tmp_path / "out", **RECORD, steps=PROSE)
    found = rows(result)
    assert [text_to_record(row["text"]) for row in found] == [
        {"name": "sch\u00c3\u00b6n", "note": "two  blanks "},
        {"name": "Home", "note": ""},
    ]
    assert all(row["meta"] == {"format": "csv", "kind": "table"} for row in found)
    as_prose = read(tmp_path / "raw", tmp_path / "prose", column="note", steps=PROSE[:1])
    assert [row["text"] for row in rows(as_prose)] == ["two blanks"], "a column of text is prose, wherever it stands"


def test_numbers_of_json_keep_their_digits(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    line = '{"price": 1.10, "far": 12345678901234567890123, "deep": [{"x": 0.30000000000000000001}], "small": 1e-400}'
    (tmp_path / "raw/a.jsonl").write_text(line + "\n")
    (tmp_path / "raw/b.json").write_text(f"[{line}]")
    for row in rows(read(tmp_path / "raw", tmp_path / "out", **RECORD)):
        assert "price: 1.10\n" in row["text"] and "0.30000000000000000001" in row["text"]
        assert text_to_record(row["text"]) == json.loads(line, parse_float=Decimal)
    sources = [{"path": "*", "rows": "record", "fields": {"price": "price", "deep": "deep"}}]
    for row in rows(read(tmp_path / "raw", tmp_path / "meta", sources=sources)):
        assert (row["meta"]["price"], row["meta"]["deep"]) == (1.1, [{"x": 0.3}]), "numbers in meta are numbers"


def test_values_that_json_has_no_type_for(tmp_path: Path) -> None:
    """Dates, Decimals and bytes within lists and structures of Parquet, in `meta` and in records."""
    (tmp_path / "raw").mkdir()
    day, amount = datetime.date(2024, 2, 29), Decimal("12.50")
    row = {"text": "a row", "seen": [{"day": day, "paid": [amount]}], "raw": [b"abc", b"\xff\x00"], "n": amount}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "raw/a.parquet")
    fields = {"seen": "seen", "raw": "raw", "n": "n"}
    (found,) = rows(read(tmp_path / "raw", tmp_path / "meta", fields=fields))
    assert found["meta"] == {"seen": [{"day": "2024-02-29", "paid": ["12.50"]}], "raw": ["abc", "ff00"], "n": "12.50"}
    (found,) = rows(read(tmp_path / "raw", tmp_path / "record", **RECORD))
    back = text_to_record(found["text"])
    assert back == {**row, "seen": [{"day": "2024-02-29", "paid": [amount]}], "raw": ["abc", "ff00"]}


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUE = st.recursive(LEAF, lambda one: st.lists(one, max_size=3) | st.dictionaries(TEXT, one, max_size=3), max_leaves=6)


@settings(max_examples=300)
@given(st.dictionaries(TEXT, VALUE, max_size=5))
def test_any_record_comes_back(record: dict[str, Any]) -> None:
    back = text_to_record(record_to_text(record))
    assert json.dumps(back) == json.dumps(record), "values, types and order"


def test_a_field_named_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2 names the field 'a' a second time"):
        text_to_record("a: 1\na: 2\n")
    nested = {"a": {"b: c": [Decimal("1.10"), {"d": None}]}, "e": []}
    assert text_to_record(record_to_text(nested)) == nested
