"""The tables of docs/stages.md are those that the declarations and `params.py` give.

`LLMCTL_UPDATE_GOLDEN=1 pytest tests/docs/test_stages.py` writes them anew.
"""

from __future__ import annotations

import os
import re
import types
import typing
from typing import Any

import pytest

from llmctl.command_table import stage_order
from llmctl.registry import get_registry
from llmctl.stage import Stage
from llmctl.train.params import TrainParams

from .conftest import DOCS

PAGE = DOCS / "stages.md"
BLOCK = re.compile(r"(<!-- (?P<kind>ports|parameters): (?P<name>[a-z-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
SHARED = "training"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def stages() -> dict[str, Stage]:
    """The stages of llmctl itself, whatever else is installed."""
    found = get_registry()
    return {n: found.stages[n] for n in stage_order(found.stages) if found.origin(n).dist == "llmctl"}


def cell(text: str) -> str:
    """Text of a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def row(*cells: str) -> str:
    return f"| {' | '.join(cell(text) for text in cells)} |\n"


def plain(value: Any) -> str:
    """A default as it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    if value is None:
        return "unset"
    return str(value) if value != "" else '""'


def type_text(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type as a person reads it: choices listed, bounds behind the name."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{plain(choice)}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_text(kind, metadata) for kind in arguments if kind is not type(None))
    if origin is typing.Annotated:
        return type_text(arguments[0], annotation.__metadata__)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"map of {type_text(arguments[0])} to {type_text(arguments[1])}"
    bounds = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in SIGNS.items()
        if getattr(item, name, None) is not None
    ]
    return " ".join([annotation.__name__, ", ".join(bounds)]).strip()


def fields(model: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Parameters with the dotted names that `--set` takes."""
    found = []
    for name, info in model.model_fields.items():
        nested = getattr(info.annotation, "model_fields", None)
        found += fields(info.annotation, f"{prefix}{name}.") if nested else [(prefix + name, info)]
    return found


def parameter_row(name: str, info: Any) -> str:
    affects = (info.json_schema_extra or {}).get("affects", "output")
    default = "required" if info.is_required() else f"`{plain(info.get_default(call_default_factory=True))}`"
    return row(f"`{name}`", type_text(info.annotation, info.metadata), default, affects, info.description or "")


def parameter_table(name: str) -> str:
    """Parameters of a stage; those that all trainers share, with one default, are in a table of their own."""
    model = TrainParams if name == SHARED else stages()[name].load_params()
    rows = [parameter_row(*field) for field in fields(model)]
    if name != SHARED and issubclass(model, TrainParams):
        shared = {parameter_row(*field) for field in fields(TrainParams)}
        rows = [text for text in rows if text not in shared]
    head = "| Parameter | Type | Default | Affects | Description |\n|---|---|---|---|---|\n"
    return head + "".join(rows)


def port_table(name: str) -> str:
    stage = stages()[name]
    head = "| Port | Direction | Type | |\n|---|---|---|---|\n"
    rows = []
    for port, spec in stage.inputs.items():
        direction = "input" + (", optional" if spec.optional else "") + (", several" if spec.many else "")
        rows.append(row(f"`{port}`", direction, " or ".join(f"`{kind}`" for kind in spec.types), spec.help))
    for port, out in stage.outputs.items():
        rows.append(row(f"`{port}`", "output", f"`{out.type}`" if out.type else f"as `{out.same_as}`", out.help))
    return head + "".join(rows)


def fresh(text: str) -> str:
    """The page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        make = {"ports": port_table, "parameters": parameter_table}[match["kind"]]
        return f"{match[1]}\n{make(match['name'])}\n{match[5]}"

    return BLOCK.sub(table, text)


def test_tables_equal_the_declarations():
    text = PAGE.read_text(encoding="utf-8")
    expected = fresh(text)
    if os.environ.get("LLMCTL_UPDATE_GOLDEN"):
        PAGE.write_text(expected, encoding="utf-8")
    else:
        assert text == expected, "run LLMCTL_UPDATE_GOLDEN=1 pytest tests/docs/test_stages.py"


def test_a_changed_default_is_noticed():
    text = PAGE.read_text(encoding="utf-8")
    changed = re.sub(r"(\| `vocab_size` \| int ≥ 1 \| `)\d+", r"\g<1>1", text)
    assert changed != text
    assert fresh(changed) != changed


@pytest.mark.parametrize("kind", ["ports", "parameters"])
def test_every_stage_has_a_section_with_its_tables(kind, pages):
    text = pages["stages.md"]
    named = [match["name"] for match in BLOCK.finditer(text) if match["kind"] == kind]
    assert named == [*([SHARED] if kind == "parameters" else []), *stages()]
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [name for name in headings if name in stages()] == list(stages())
