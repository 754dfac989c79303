"""Tasks that end in the middle, files that are cut, and parameters that would undo each other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pydantic
import pytest

from llmctl import Artifact, InputError, StageError, TempFail
from llmctl.testing import StageResult, run_stage
from llmctl.text.cleaning.code_detection import NAMES, SUFFIXES
from llmctl.text.datasets import read_rows
from llmctl_data import DATA, remote, tasks
from llmctl_data.params import DataParams
from llmctl_data.readers.formats import CODE_NAMES, LANGUAGES

PLAIN = {"emit": ["text"], "validation_share": 0.0, "workers": 1}


def run(out: Path, root: Path | None = None, *, stop_after: int | None = None, **params: Any) -> StageResult:
    files = {} if root is None else {"files": [Artifact(root, "files")]}
    return run_stage(DATA, out, {**PLAIN, **params}, stop_after=stop_after, **files)


def test_a_directory_that_gets_no_name_is_an_error(tmp_path: Path) -> None:
    """Not where another worker was faster: there is the same already."""
    for name in ("aside", "late"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ledger.json").write_text("{}")
    with pytest.raises(StageError, match="cannot be written: No such file or directory") as caught:
        tasks.publish(tmp_path / "aside", tmp_path / "gone/000000")
    assert "free space" in str(caught.value.hint)
    tasks.publish(tmp_path / "aside", tmp_path / "000000")
    tasks.publish(tmp_path / "late", tmp_path / "000000")
    assert (tmp_path / "000000/ledger.json").is_file()


def test_labelled_rows_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    """What the stage makes itself is written anew in every run, with the same bytes."""
    values = {"emit": ["text", "labelled"], "reader": "toy-sentiment", "rows": 60}
    steps = [{"name": "balance", "by": "class", "alpha": 1}]
    with pytest.raises(TempFail):
        run(tmp_path, **values, steps=steps, stop_after=0)
    spool = tmp_path / ".resume/spool/documents.jsonl.gz"
    first, plan = spool.read_bytes(), (tmp_path / ".resume/shards/plan.json").stat().st_ino
    os.utime(spool, (1, 1))
    run(tmp_path, **values, steps=steps)
    assert spool.read_bytes() == first
    assert (tmp_path / ".resume/shards/plan.json").stat().st_ino == plan, "the finished tasks were thrown away"


def test_a_file_that_is_cut_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    (tmp_path / "raw").mkdir()
    lines = "".join(json.dumps({"text": f"text {n} " + "word " * 40}) + "\n" for n in range(1000))
    (tmp_path / "raw/a.jsonl").write_text(lines)
    (tmp_path / "raw/b.txt").write_text("small")
    asked: list[str] = []
    digest_of = tasks.digest_of
    monkeypatch.setattr(tasks, "digest_of", lambda piece: asked.append(piece.name) or digest_of(piece))
    result = run(tmp_path / "out", tmp_path / "raw", task_bytes=1 << 16)
    assert asked == ["b.txt"]
    listed = [json.loads(line) for line in (result.outputs["metrics"].path / "files.jsonl").read_text().splitlines()]
    digests = {told["name"]: told["digest"] for told in listed}
    for name, digest in digests.items():
        assert digest == f"sha256:{hashlib.sha256((tmp_path / 'raw' / name).read_bytes()).hexdigest()}"


BALANCE = {"name": "balance"}
EXACT, NEAR = {"name": "exact-duplicates"}, {"name": "near-duplicates"}
NOISE = {"name": "augment", "group": "a", "share": 0.2, "method": "noise"}


@pytest.mark.parametrize(
    ("steps", "weight", "made"),
    [
        ([BALANCE, EXACT], 1, "step balance"),
        ([BALANCE, {"name": "unicode"}, NEAR], 1, "step balance"),
        ([NOISE, NEAR], 1, "step augment"),
        ([NOISE, {**BALANCE, "size": "down"}, NEAR], 1, "step augment"),
        ([EXACT], 2, "sources: `\\*` with weight 2"),
        ([NEAR], 1.5, "sources: `\\*` with weight 1.5"),
    ],
)
def test_copies_that_a_later_step_would_take_away_are_refused(
    steps: list[dict[str, Any]], weight: float, made: str
) -> None:
    with pytest.raises(pydantic.ValidationError, match=f"would take away the copies .*{made}.*balance"):
        DataParams(steps=steps, sources=[{"path": "*", "weight": weight}])


@pytest.mark.parametrize(
    "steps",
    [[EXACT, NEAR, BALANCE, NOISE], [{**BALANCE, "size": "down"}, EXACT, NEAR], [{**NEAR, "action": "tag"}], []],
)
def test_copies_that_stay_are_not(steps: list[dict[str, Any]]) -> None:
    assert DataParams(steps=steps, sources=[{"path": "*", "weight": 2 if not steps else 0.5}])


def test_twins_are_guarded_as_decontaminate_looks(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    texts = [f"w{n} " * 3 + " ".join(f"v{n * 7 + k}" for k in range(9)) for n in range(40)]
    told = [{"text": text, "label": "rare" if n < 8 else "often"} for n, text in enumerate(texts)]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"sentence": texts[0]}) + "\n" + json.dumps({"sentence": "x y"}))
    augment = {"name": "augment", "group": "rare", "share": 0.4, "method": "noise"}
    look = {"name": "decontaminate", "fields": ["sentence"], "ngram": 6, "min_words": 4, "action": "tag"}
    values = {**PLAIN, "fields": {"label": "label"}, "steps": [look, augment]}
    evaluation = [Artifact(tmp_path / "quiz.jsonl", "files")]
    result = run_stage(DATA, tmp_path / "out", values, files=[Artifact(root, "files")], evaluation=evaluation)
    step = json.loads((result.outputs["text"].path / "audit.json").read_text())["steps"][1]
    assert (step["facts"]["refused"], step["facts"]["items"], step["facts"]["items_too_short"]) == (1, 1, 1)
    assert {name: step["params"][name] for name in ("fields", "ngram", "min_words")} == {
        name: look[name] for name in ("fields", "ngram", "min_words")
    }
    kept = [row for row in read_rows(result.outputs["text"], "train") if row["text"] == texts[0]]
    assert len(kept) == 1 and "parent" not in kept[0]["meta"]
    warnings = [fields["text"] for kind, fields in result.events if kind in ("warn", "warning")]
    assert any("1 of 2 evaluation items are too short" in text for text in warnings), result.events


def test_languages_are_called_alike_by_readers_and_steps(tmp_path: Path) -> None:
    for ours, theirs in ((LANGUAGES, SUFFIXES), (CODE_NAMES, NAMES)):
        assert {name: ours[name] for name in ours.keys() & theirs} == {
            name: theirs[name] for name in ours.keys() & theirs
        }
    assert all(name == name.lower() for name in LANGUAGES.values())
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.py").write_text("def f():\n    return 1\n")
    (tmp_path / "raw/b.py").write_text("def f(:\n    return 1\n")
    (tmp_path / "raw/c.rs").write_text("fn main() {}\n")
    steps = [{"name": "select", "by": "code", "keep": ["python"]}, {"name": "code", "parses": True}]
    result = run(tmp_path / "out", tmp_path / "raw", steps=steps)
    assert [row["id"] for row in read_rows(result.outputs["text"], "train")] == ["a.py"]


def test_addresses_without_files_say_what_to_do(tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/shelf/a.txt", b"a")
    try:
        with pytest.raises(InputError, match="nothing matches memory://shelf/") as caught:
            remote.expand("memory://shelf/*.jsonl")
    finally:
        files.rm("/shelf", recursive=True)
    assert "`**`" in str(caught.value.hint)
