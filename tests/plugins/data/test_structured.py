"""XML and tables in HTML as records: to text and back, against lxml's reading of the same files."""

from __future__ import annotations

import html
import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmctl import Artifact
from llmctl.testing import StageResult, run_stage
from llmctl.text.datasets import read_rows
from llmctl_data import DATA
from llmctl_data.records import text_to_record

etree = pytest.importorskip("lxml.etree")
DIGITS = ("1.10", "007", "-0.0", "12345678901234567890123", "1e5", "+4", "1,000.50", "0x1F", "NaN", "true", "null")
WORDS = ("otter", "süß", "two words", "a: b", '"quoted"', "<b>&amp;", "\u732b", "'", "]]>")
PLAIN = {"emit": ["text"], "validation_share": 0.0, "workers": 1, "sources": [{"path": "*", "rows": "record"}]}


def read(root: Path, out: Path, **params: Any) -> StageResult:
    return run_stage(DATA, out, {**PLAIN, **params}, files=[Artifact(root, "files")])


def records(result: StageResult) -> list[dict[str, Any]]:
    """The records, back from their text, in the order of the files."""
    rows = sorted(read_rows(result.outputs["text"], "train"), key=lambda row: int(row["id"].rpartition("#")[2]))
    assert all(row["meta"]["kind"] == "table" for row in rows)
    return [text_to_record(row["text"]) for row in rows]


def rejects(result: StageResult) -> dict[str, str]:
    lines = (result.outputs["metrics"].path / "rejects.jsonl").read_text().splitlines()
    return {told["where"]: told["detail"] for told in map(json.loads, lines)}


def ordered(value: Any) -> str:
    """Equal only for equal values, types and order."""
    return json.dumps(value, ensure_ascii=False)


def folder(tmp_path: Path, **files: str | bytes) -> Path:
    root = tmp_path / "raw"
    root.mkdir()
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (root / name.replace("_", ".")).write_bytes(data)
    return root


# --- XML ---


def grow(parent: Any, rng: random.Random, depth: int) -> None:
    """Attributes, text or elements, some of one name."""
    for name in rng.sample(["id", "unit", "xml:lang"], rng.randrange(3)):
        parent.set(name.replace("xml:", "{http://www.w3.org/XML/1998/namespace}"), rng.choice(DIGITS + WORDS))
    if depth and rng.random() < 0.7:
        for name in rng.sample(["name", "price", "tag", "deep"], rng.randrange(1, 5)):
            for _ in range(rng.choice([1, 1, 1, 3])):
                grow(etree.SubElement(parent, name), rng, depth - 1)
    elif rng.random() < 0.9:
        text = rng.choice(DIGITS + WORDS)
        parent.text = etree.CDATA(text) if rng.random() < 0.3 and "]]>" not in text else text


def expected(element: Any) -> Any:
    """What lxml reads, by the rules of docs/data.md."""
    found: dict[str, Any] = {
        "@" + key.replace("{http://www.w3.org/XML/1998/namespace}", "xml:"): value for key, value in element.items()
    }
    for name in dict.fromkeys(child.tag for child in element):
        values = [expected(child) for child in element.findall(name)]
        found[name] = values if len(values) > 1 else values[0]
    text = element.text or ""
    if len(element) or (found and not text):
        return found
    return {**found, "#text": text} if found else text


@pytest.mark.parametrize(("seed", "encoding"), [(1, "utf-8"), (2, "utf-16"), (3, "iso-8859-1"), (4, "utf-8")])
def test_xml_is_what_lxml_reads_and_comes_back(tmp_path: Path, seed: int, encoding: str) -> None:
    rng = random.Random(seed)
    root = etree.Element("catalogue")
    for _ in range(300):
        grow(etree.SubElement(root, "item"), rng, 3)
    data = etree.tostring(root, encoding=encoding, xml_declaration=True, pretty_print=seed % 2 == 0)
    result = read(folder(tmp_path, a_xml=data), tmp_path / "out")
    again = etree.fromstring(data)
    wanted = [value if isinstance(value := expected(item), dict) else {"item": value} for item in again]
    found = records(result)
    empty = sum(not record for record in wanted)
    assert empty == 0 and ordered(found) == ordered(wanted)


def test_fields_of_xml_and_its_text(tmp_path: Path) -> None:
    """As any other rows: a column of text, others as `meta`; without `format` a file of XML is source code."""
    data = "<shop>\n<book id='7'><about>On otters.</about><by><name>Ann</name></by></book>\n</shop>"
    entry = {"path": "*", "format": "xml", "fields": {"text": "about", "id": "@id", "author": "by.name"}}
    root = folder(tmp_path, a_xml=data)
    (row,) = read_rows(read(root, tmp_path / "out", sources=[entry]).outputs["text"], "train")
    assert (row["id"], row["text"], row["meta"]) == ("7", "On otters.", {"element": "book", "author": "Ann"})
    (row,) = read_rows(read(root, tmp_path / "code", sources=[]).outputs["text"], "train")
    assert row["text"] == data and row["meta"] == {"code": "xml"}


@pytest.mark.parametrize(
    ("data", "where", "detail", "kept"),
    [
        ("<r>\n<a><x>1</x></a>\n<a><x>2</y></a>\n<a/></r>", "a.xml:3:10", "no valid XML: mismatched tag", 1),
        ("<r>\n<a><x>1</x></a>\n<a><x>2", "a.xml:3:8", "no valid XML: no element found", 1),
        ("<r>\n<a><x>1 & 2</x></a>\n</r>", "a.xml:2:10", "no valid XML: not well-formed", 0),
        ("<r>\n<a><x>1</x></a>\nloose\n<a><x>2</x></a></r>", "a.xml:3", "text between records: 'loose'", 2),
        ("<r>\n<a><x>1</x></a>\n<a>\nfor <x>2</x></a>\n<a><x>3</x></a></r>", "a.xml:3", "`a` holds text beside", 2),
        (f"<r>\n<a>{'<b>' * 200}{'</b>' * 200}</a>\n<a><x>1</x></a></r>", "a.xml:2", "more than 100 deep", 1),
        (f"<r>\n<a><x>{'long ' * 900}</x></a>\n<a><x>1</x></a></r>", "a.xml:2", "more than 2,000 bytes", 1),
        ('<!DOCTYPE r [\n<!ENTITY a "b">]>\n<r><a><x>&a;</x></a></r>', "a.xml:2", "it declares the entity `a`", 0),
        ('<?xml version="1.0" encoding="klingon"?>\n<r><a/></r>', "a.xml:1", "unknown encoding: klingon", 0),
        ('<?xml version="1.0" encoding="shift_jis"?>\n<r><a/></r>', "a.xml:1", "multi-byte encodings", 0),
        ("<r>\n</r>", "a.xml", "no element lies below the root", 0),
        ("<!DOCTYPE r SYSTEM 'x.dtd'>\n<r>\n<a><x>&z;</x></a></r>", "a.xml:3", "it uses the entity `z`", 0),
    ],
)
def test_broken_xml_is_named_by_its_line(tmp_path: Path, data: str, where: str, detail: str, kept: int) -> None:
    root = folder(tmp_path, a_xml=data, b_csv="n\n1\n")
    result = read(root, tmp_path / "out", max_document_bytes=2000)
    ((place, said),) = rejects(result).items()
    assert place == where and detail in said
    assert len(list(read_rows(result.outputs["text"], "train"))) == kept + 1


# --- tables ---


def page(rows: list[list[str]], names: list[str]) -> str:
    """A table among other things; every second row without the end tags that HTML does not ask for."""
    lines = ["<!DOCTYPE html><title>Prices</title><p>Before.<table><caption>All <i>prices</i></caption>"]
    lines.append("<thead><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr></thead><tbody>")
    for number, row in enumerate(rows):
        end = "" if number % 2 else "</td>"
        lines.append(
            "<tr>" + "".join(f"<td>{html.escape(cell)}{end}" for cell in row) + ("" if number % 2 else "</tr>")
        )
    return "\n".join([*lines, "</tbody></table><p>After <b>it</b>.</p>"])


def test_tables_are_what_lxml_reads_and_come_back(tmp_path: Path) -> None:
    rng = random.Random(5)
    names = ["name", "unit price", "a: b", "n & m"]
    rows = [[rng.choice(DIGITS + WORDS) for _ in names] for _ in range(200)]
    text = page(rows, names)
    result = read(folder(tmp_path, a_html=text), tmp_path / "out")
    tree = etree.HTML(text)
    theirs = [[" ".join("".join(cell.itertext()).split()) for cell in row.iter("td")] for row in tree.iter("tr")][1:]
    assert theirs == rows
    assert ordered(records(result)) == ordered([dict(zip(names, row, strict=True)) for row in theirs])
    told = next(read_rows(result.outputs["text"], "train"))["meta"]
    assert (told["table"], told["caption"], told["format"]) == (1, "All prices", "html-tables")


SPANS = """<table>
<tr><th rowspan=2>city<th colspan=2>people</tr>
<tr><th>1990<th>2000</tr>
<![odd mark[ x ]]><tr><td>Kiel<td>7<td>8<tr><td>Bern<td>7
</table>
<table><thead>
<tr><th rowspan=2>city<th colspan=2>people</tr>
<tr><th>1990<th>2000<script>var x = "<td>";</script></tr></thead>
<tr><td rowspan=2>Ulm<td>1<br>10<td>2</tr>
<tr><td colspan=2>none<table><tr><th>in<tr><td>inner</table></td></tr>
<tr><th>Bonn<td>3<td></tr></table>"""


def test_cells_that_span_and_tables_in_cells(tmp_path: Path) -> None:
    result = read(folder(tmp_path, a_html=SPANS), tmp_path / "out")
    assert records(result) == [
        {"city": "Kiel", "people 1990": "7", "people 2000": "8"},
        {"city": "Ulm", "people 1990": "1 10", "people 2000": "2"},
        {"city": "Ulm", "people 1990": "none", "people 2000": "none"},
        {"city": "Bonn", "people 1990": "3", "people 2000": ""},
        {"in": "inner"},
    ]
    assert rejects(result) == {"a.html:4": "2 cells, the header of table 1 names 3"}


def test_cells_end_with_their_row_group(tmp_path: Path) -> None:
    """As the standard's algorithm for growing cells has it: at the end of a row group they are cut off."""
    groups = (
        "<table><thead><tr><th rowspan=9>a<th>b</thead>"
        "<tbody><tr><td rowspan=0>1<td>2<tr><td>3<tr><td>4</tbody>"
        "<tr><td rowspan=5>5<td>6<tfoot><tr><td>7<td>8</table>"
    )
    result = read(folder(tmp_path, a_html=groups), tmp_path / "o")
    pairs = [("1", "2"), ("1", "3"), ("1", "4"), ("5", "6"), ("7", "8")]
    assert records(result) == [{"a": one, "b": two} for one, two in pairs]
    assert rejects(result) == {}


def test_a_span_of_thousands_of_digits_is_a_long_one(tmp_path: Path) -> None:
    """Python reads no number of more than 4300 digits."""
    text = f"<table><tr><th>a<th>b<tr><td rowspan=0002>1<td>2<tr><td>3<tr><td colspan={'9' * 5000}>x</table>"
    result = read(folder(tmp_path, a_html=text), tmp_path / "o")
    assert records(result) == [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}]
    assert list(rejects(result).values()) == ["1000 cells, the header of table 1 names 2"]


def test_templates_hold_no_rows(tmp_path: Path) -> None:
    inner = "<table><tr><th>x<tr><td>y</table>"
    text = f"<template>{inner}</template><table><tr><th>a<template><td>no{inner}</template><tr><td>1</table>"
    result = read(folder(tmp_path, a_html=text), tmp_path / "o")
    assert records(result) == [{"a": "1"}]


@pytest.mark.parametrize(
    ("text", "where", "detail", "kept"),
    [
        (
            "<table><tr><th>a<th>b\n<tr><td>1<td>2\n<tr><td>3\n<tr><td>4<td>5</table>",
            "a.html:3",
            "1 cells, the header",
            2,
        ),
        ("<p>\n<table><tr><th>a<th>a\n<tr><td>1<td>2</table>", "a.html:2", "table 1 calls two columns `a`", 0),
        ("<p>\n<table><tr><th>a\n<tr><td>1", "a.html:2", "the table has no end", 1),
        ("<p>\n<table><tr><td>a\n<tr><td>1</table>", "a.html:2", "table 1 has no header row", 0),
        ("<p>nothing", "a.html", "the page has no table", 0),
        (f"<table><tr><th>a\n<tr>{'<td colspan=1000>x' * 90}</table>", "a.html:2", "10000 cells, the header", 0),
    ],
)
def test_broken_tables_are_named_by_their_line(tmp_path: Path, text: str, where: str, detail: str, kept: int) -> None:
    result = read(folder(tmp_path, a_html=text, b_csv="n\n1\n"), tmp_path / "out")
    ((place, said),) = rejects(result).items()
    assert place == where and detail in said
    assert len(list(read_rows(result.outputs["text"], "train"))) == kept + 1


# --- other rows ---


def test_what_has_no_rows_is_named(tmp_path: Path) -> None:
    root = folder(
        tmp_path, a_csv="n,n\n1,2\n", b_md="# Words", c_jsonl='{"n": ' + "[" * 5000 + "]" * 5000 + "}", d_tsv="n\n1\n"
    )
    result = read(root, tmp_path / "out")
    found = rejects(result)
    assert found.pop("a.csv:1") == "two columns are called `n`"
    assert found.pop("b.md") == "rows: record asks for its rows, and markdown has none"
    ((where, said),) = found.items()
    assert where == "c.jsonl:1" and "recursion" in said
    assert records(result) == [{"n": "1"}]
