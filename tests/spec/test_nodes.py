from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.spec.diagnostics import SpecError, Text
from llmctl.spec.nodes import Map, Scalar, Sequence, parse, scalar_value


def read(content: str):
    return parse(Text("t.yaml", content, Path("/base")))


# Written by hand from YAML 1.2.2, section 10.3.2 (core schema); the last column is what PyYAML 6 makes of it.
TABLE = [
    ("3e-4", 0.0003, "'3e-4'"),
    ("1e5", 100000.0, "'1e5'"),
    ("1E+5", 100000.0, "'1E+5'"),
    ("-3e-4", -0.0003, "'-3e-4'"),
    (".5", 0.5, "0.5"),
    ("5.", 5.0, "5.0"),
    ("1.10", 1.1, "1.1"),
    ("on", "on", "True"),
    ("off", "off", "False"),
    ("yes", "yes", "True"),
    ("No", "No", "False"),
    ("y", "y", "'y'"),
    ("true", True, "True"),
    ("True", True, "True"),
    ("TRUE", True, "True"),
    ("tRUE", "tRUE", "'tRUE'"),
    ("false", False, "False"),
    ("010", 10, "8"),
    ("0o10", 8, "'0o10'"),
    ("0x1F", 31, "31"),
    ("0b11", "0b11", "3"),
    ("1_000", "1_000", "1000"),
    ("+7", 7, "7"),
    ("-7", -7, "-7"),
    ("1:30", "1:30", "90"),
    ("1:30:00.5", "1:30:00.5", "5400.5"),
    ("2024-01-01", "2024-01-01", "date"),
    ("~", None, "None"),
    ("null", None, "None"),
    ("Null", None, "None"),
    ("nULL", "nULL", "'nULL'"),
    (".inf", math.inf, "inf"),
    ("-.INF", -math.inf, "-inf"),
    (".Inf", math.inf, "inf"),
    ("inf", "inf", "'inf'"),
    ("nan", "nan", "'nan'"),
    ("1e", "1e", "'1e'"),
    (".", ".", "'.'"),
    ("-", "-", "'-'"),
    ("0o8", "0o8", "'0o8'"),
    ("１２", "１２", "'１２'"),  # full-width digits are not digits of YAML
    ("<<", "<<", "'<<'"),
]


@pytest.mark.parametrize(("text", "value", "_pyyaml"), TABLE)
def test_plain_scalars_follow_yaml_1_2_core(text, value, _pyyaml):
    got = scalar_value(text)
    assert (type(got), got) == (type(value), value)


def test_not_a_number_is_a_float():
    assert math.isnan(scalar_value(".nan")) and math.isnan(scalar_value(".NAN"))


def test_quoted_scalars_are_text():
    node = read("""{a: "3e-4", b: '10', c: |\n  12\n}""".replace("|\n  12\n", "'12'"))
    assert [entry.value.value for entry in node.entries.values()] == ["3e-4", "10", "12"]
    assert read("a: |\n  12\n").get("a").value == "12\n"


def test_marks_count_lines_and_characters_from_one():
    node = read("# ä\nstages:\n  träin: {lr: -3e-4, tags: [ä, b]}\n")
    entry = node.get("stages").entries["träin"]
    assert (entry.key.line, entry.key.column, entry.key.end_column) == (3, 3, 8)
    lr = entry.value.entries["lr"]
    assert (lr.key.column, lr.value.mark.column, lr.value.mark.end_column) == (11, 15, 20)
    assert entry.value.entries["tags"].value.items[1].mark.column == 32


def test_aliases_are_shared_values():
    node = read("a: &x {k: 1}\nb: *x\n")
    assert node.get("b") is node.get("a")


BAD = [
    ("a: [1, 2", "E001", "t.yaml:1:9", "not YAML"),
    ("a: 1\n\tb: 2\n", "E001", "t.yaml:2:1", "not YAML"),
    ("a: b: c\n", "E001", "t.yaml:1:5", "not YAML"),
    ("a: !!str 3\n", "E001", "t.yaml:1:4", "tags are not allowed"),
    ("a: !!python/object/apply:os.system ['true']\n", "E001", "t.yaml:1:4", "tags are not allowed"),
    ("a: ! 3\n", "E001", "t.yaml:1:4", "tags are not allowed"),
    ("a: !replace [1]\n", "E001", "t.yaml:1:4", "`!replace` stands before a map only"),
    ("a: 1\n---\nb: 2\n", "E001", "t.yaml:2:1", "one YAML document"),
    ("a: *x\n", "E001", "t.yaml:1:4", "is not defined above"),
    ("a: &x [*x]\n", "E001", "t.yaml:1:8", "inside the value it names"),
    ("a: 1\x00\n", "E001", "t.yaml:1:5", "not YAML"),
    ("a: " + "9" * 5000, "E001", "t.yaml:1:4", "a number of 5000 digits"),
    ("1: x\n", "E003", "t.yaml:1:1", "not `1`"),
    ("true: x\n", "E003", "t.yaml:1:1", "not `true`"),
    ("[a]: x\n", "E003", "t.yaml:1:1", "not a map or list"),
    ("a: 1\nb: {c: 1}\na: 2\n", "E004", "t.yaml:3:1", "duplicate key `a`, first on line 1"),
    ("x:\n  a: 1\n  'a': 2\n", "E004", "t.yaml:3:3", "duplicate key `a`, first on line 2"),
    ("a: " + "[" * 200 + "]" * 200, "E002", "t.yaml:1:103", "nested deeper than 100"),
]


@pytest.mark.parametrize(("content", "code", "place", "message"), BAD)
def test_mistakes_in_the_text_have_a_place(content, code, place, message):
    with pytest.raises(SpecError) as caught:
        read(content)
    (found,) = caught.value.diagnostics
    assert (found.code, str(found.mark)) == (code, place)
    assert message in found.message
    assert found.render()


def test_an_alias_bomb_ends_at_the_budget():
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(SpecError, match="more than 200000 values"):
        read("\n".join(bomb))


def test_a_long_spec_is_within_the_budget():
    assert len(read("\n".join(f"k{n}: {n}" for n in range(20_000))).entries) == 20_000


def test_an_empty_text_has_no_value():
    assert read("") is None and read("# only a comment\n") is None


@given(st.text(max_size=60))
def test_any_text_gives_a_node_or_a_diagnostic_with_a_place(content):
    try:
        node = read(content)
    except SpecError as error:
        assert all(found.render() for found in error.diagnostics)
    else:
        assert node is None or isinstance(node, Scalar | Sequence | Map)
