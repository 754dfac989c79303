"""Keys, error codes, exit codes and artifact types in the pages are those that there are."""

from __future__ import annotations

import re

from llmctl.errors import BY_EXIT_CODE
from llmctl.launch.signals import CODES
from llmctl.spec.fields import field_names
from llmctl.spec.skeleton import (
    DefaultsModel,
    EnvModel,
    GateModel,
    PipelineModel,
    ResourcesModel,
    SingleModel,
    SourceModel,
    StageModel,
)

from .conftest import ROOT


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_error_code_is_in_the_table_and_no_other(pages):
    sources = (ROOT / "llmctl" / "spec").glob("*.py")
    used = {code for path in sources for code in re.findall(r'"(E\d{3})"', path.read_text(encoding="utf-8"))}
    assert set(re.findall(r"^\| (E\d{3}) \|", pages["specs.md"], re.MULTILINE)) == used


def test_every_key_of_a_file_and_of_a_stage_has_a_row(pages):
    pairs = re.compile(r"^\| `(\w+)(?:`, `(\w+))?", re.MULTILINE)
    for title, model, others in (
        ("Keys of a file", PipelineModel, {"include"}),
        ("Keys of a stage", StageModel, set()),
    ):
        rows = {key for pair in pairs.findall(section(pages["specs.md"], title)) for key in pair if key}
        assert rows == set(field_names(model)) | others, title


def test_the_keys_inside_are_named(pages):
    text = pages["specs.md"]
    for model in (ResourcesModel, GateModel, SourceModel, EnvModel):
        missing = [key for key in field_names(model) if f"`{key}`" not in text and f"{key}: " not in text]
        assert missing == [], model.__name__


def test_what_is_not_supported_yet_is_listed(pages):
    listed = pages["specs.md"].split("E104 covers:")[1].split("\n\n")[0]
    models = (PipelineModel, SingleModel, StageModel, SourceModel, EnvModel, ResourcesModel, DefaultsModel)
    assert [key for model in models for key in sorted(model.later) if f"`{key}`" not in listed] == []


def test_every_exit_code_is_in_the_table(pages):
    rows = re.findall(r"^\| ([\d, ]+) \|", section(pages["shell.md"], "Exit codes"), re.MULTILINE)
    listed = {int(code) for row in rows for code in row.split(",")}
    assert {*BY_EXIT_CODE, *CODES.values(), 0, 1, 124, 141} == listed


def test_every_artifact_type_is_in_the_table(pages):
    from llmctl.store.types import TYPES

    rows = set(re.findall(r"^\| `([a-z.]+)` \|", section(pages["artifacts.md"], "Types"), re.MULTILINE))
    assert rows == set(TYPES) - {"report"}  # no stage makes or takes it yet
