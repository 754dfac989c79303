"""A split that would be empty is filled by one unit, and no copy of it stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl import Artifact
from llmctl.testing import StageResult, run_stage
from llmctl.text.datasets import read_rows, splits
from llmctl_data import DATA

TINY, ALMOST = 1e-12, 1 - 1e-12
"""Shares at which every hash goes to training, to validation."""


def run(root: Path, out: Path, share: float, **params: Any) -> StageResult:
    values = {"emit": ["text"], "validation_share": share, "workers": 1, **params}
    return run_stage(DATA, out, values, files=[Artifact(root, "files")])


def by_split(result: StageResult) -> dict[str, list[dict[str, Any]]]:
    return {split: list(read_rows(result.outputs["text"], split)) for split in splits(result.outputs["text"])}


def texts(rows: list[dict[str, Any]]) -> set[str]:
    return {row["text"] for row in rows}


def folder(root: Path, count: int) -> Path:
    root.mkdir()
    lines = [json.dumps({"text": f"document {n}", "group": "few" if n < 2 else "many"}) for n in range(count)]
    (root / "a.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("share", [TINY, ALMOST])
@pytest.mark.parametrize(
    "params",
    [
        {"sources": [{"path": "*", "weight": 3}]},
        {"steps": [{"name": "balance", "by": "group", "alpha": 0, "size": "up"}], "fields": {"group": "group"}},
    ],
    ids=["weight", "balance"],
)
def test_copies_of_the_first_document_go_with_it(tmp_path: Path, share: float, params: dict[str, Any]) -> None:
    found = by_split(run(folder(tmp_path / "raw", 8), tmp_path / "out", share, **params))
    train, validation = found["train"], found["validation"]
    assert train and validation and not texts(train) & texts(validation)
    assert texts(train) | texts(validation) == {f"document {n}" for n in range(8)}
    assert texts(validation if share == TINY else train) == {"document 0"}
    copied = "sources" in params or share == TINY  # what is measured on is not repeated by balance
    assert len(validation if share == TINY else train) == (3 if copied else 1)


def test_pieces_of_a_file_go_together_over_tasks(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    for number in range(24):
        size = 300_000 if number == 0 else 100
        text = "".join(f"Line {n} of file {number} stands here.\n\n" for n in range(size // 35))
        (root / f"{number:02d}.txt").write_text(text)
    result = run(root, tmp_path / "out", TINY, task_bytes=1 << 16)
    assert len(list((tmp_path / "out/.resume/shards/read-0").iterdir())) > 3
    found = by_split(result)
    assert {row["source"] for row in found["validation"]} == {"00.txt"}
    assert {row["source"] for row in found["train"]} == {f"{n:02d}.txt" for n in range(1, 24)}
    audit = json.loads((result.outputs["text"].path / "audit.json").read_text())
    told = {split: counts["documents"] for split, counts in audit["kept"]["by_split"].items()}
    assert told == {split: len(rows) for split, rows in found.items()}
    assert audit["kept"]["documents"] == sum(told.values())
    assert audit["kept"]["bytes"] == sum(len(row["text"]) for rows in found.values() for row in rows)


@pytest.mark.parametrize("share", [TINY, ALMOST])
def test_a_single_unit_is_trained_on(tmp_path: Path, share: float) -> None:
    found = by_split(run(folder(tmp_path / "raw", 1), tmp_path / "out", share, sources=[{"path": "*", "weight": 3}]))
    assert len(found["train"]) == 3 and not found.get("validation")
