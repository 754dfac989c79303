"""The whole run over shards: plan, tasks of every phase, and the dataset out of what they left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llmctl import Artifact, Context, InputError
from llmctl.text.cleaning.balance_params import GUARD
from llmctl.text.cleaning.step import CorpusStep
from llmctl.text.datasets import join_members, pack_row
from llmctl.text.documents import Document
from llmctl_data import parts, placing, pool, shuffle, tasks
from llmctl_data.ledger import DocumentLedger, ReadLedger, StepLedger, merged, size_of
from llmctl_data.params import DataParams
from llmctl_data.plan import Plan, folder, make_plan
from llmctl_data.readers.formats import known_endings
from llmctl_data.readers.piece import Reject
from llmctl_data.sources import Found

WORK = "shards"


@dataclass
class Result:
    """What a run over shards gave: counts, and the way to pass through the rows."""

    plan: Plan
    found: Found
    read: ReadLedger
    kept: DocumentLedger
    steps: list[dict[str, Any]]
    last: dict[str, Any] | None
    """The very first document, which comes last, with its split."""
    folders: list[Path]
    """What the tasks of the last segment left."""
    first_folders: list[Path]
    """What those of the first segment left: rejects, files."""
    splits: dict[str, int] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[Document, str]]:
        """Every document with its split, the first one last."""
        for number, place in enumerate(self.folders):
            first = parts.first_of(place)
            if first is None:
                continue
            if self.last is None or number != self.last["task"]:
                yield _document(first["row"]), first["split"]
            told = _ledger(place)
            for row, split in parts.rows_of(place, list(told["splits"])):
                yield _document(row), split
        if self.last is not None:
            yield _document(self.last["row"]), self.last["split"]


def _document(row: dict[str, Any]) -> Document:
    return Document(row["id"], row["source"], row["text"], meta=row.get("meta") or {})


def _ledger(place: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((place / tasks.LEDGER).read_text(encoding="utf-8"))
    return told


@dataclass(frozen=True)
class OtherInputs:
    """What some steps need beside the documents."""

    evaluation: Sequence[Path] = ()
    models: Sequence[Artifact] = ()
    """Two that translate, there and back, or none."""


def told_steps(params: DataParams, others: OtherInputs) -> list[dict[str, Any]]:
    """The parameters of every step as JSON, with the inputs that it uses."""
    steps = [step.model_dump(mode="json") for step in params.steps]
    seeks = next((told for told in steps if told["name"] == "decontaminate"), {})
    for told in steps:
        if told["name"] == "augment":  # what may have no twin is what must not be trained on
            told |= {name: seeks.get(name) for name in GUARD if told[name] is None}
        if told["name"] in ("decontaminate", "augment"):
            told["evaluation"] = [str(path) for path in others.evaluation]
        if told.get("method") == "back-translation":
            told["models"] = [[str(model.path), model.type] for model in others.models]
    return steps


def workers_of(params: DataParams) -> int:
    """How many processes may work."""
    return params.workers or len(os.sched_getaffinity(0))


def run_shards(ctx: Context, params: DataParams, found: Found, others: OtherInputs | None = None) -> Result:
    """Do everything up to the dataset's parts. InputError if no document is left; raises TempFail when stopped."""
    work = ctx.resume_dir / WORK
    steps = told_steps(params, others or OtherInputs())
    made = [tasks.build_step(told, params.seed) for told in steps]  # what one of them lacks is said before any work
    corpus = [place for place, step in enumerate(made) if isinstance(step, CorpusStep)]
    facts = {
        "seed": params.seed,
        "validation_share": params.validation_share,
        "on_error": params.on_error,
        "steps": steps,
    }
    if params.on_error == "fail" and (fault := next((item for item in found.rejects if item.fault), None)):
        raise fault.error(fault.name)
    plan = make_plan(work, found.pieces, params.task_bytes, facts, corpus)
    _work_through(ctx, params, plan, work)
    return _gather(plan, work, found)


def _work_through(ctx: Context, params: DataParams, plan: Plan, work: Path) -> None:
    """All phases, one after the other, each with all its tasks."""
    done = 0
    every = range(plan.tasks)
    total = plan.tasks * plan.segments + 2 * len(plan.corpus)

    def one_more() -> None:
        nonlocal done
        done += 1
        ctx.progress(min(done, total), total)

    def run(phase: str, numbers: Sequence[int]) -> None:
        if not workers.run(phase, numbers, one_more, ctx.should_stop):
            raise ctx.stopped(done)

    with pool.opened(work, workers_of(params)) as workers:
        for segment in range(plan.segments):
            run(f"read-{segment}", every)
            if segment < len(plan.corpus) and plan.tasks:
                folders = [folder(work, f"read-{segment}", task) for task in every]
                run(f"match-{segment}", range(len(shuffle.ranges(folders))))
                run(f"resolve-{segment}", [0])


def _gather(plan: Plan, work: Path, found: Found) -> Result:
    """Add up what all tasks counted."""
    every = range(plan.tasks)
    last_folders = [folder(work, f"read-{plan.segments - 1}", task) for task in every]
    first_folders = [folder(work, "read-0", task) for task in every]
    read: ReadLedger = merged(ReadLedger, (_ledger(place)["read"] for place in first_folders))
    for reject in found.rejects:
        read.reject(reject)
    kept: DocumentLedger = merged(DocumentLedger, (_ledger(place)["kept"] for place in last_folders))
    steps = [StepLedger(told["name"], place, plan.seed) for place, told in enumerate(plan.steps)]
    for segment in range(plan.segments):
        for task in every:
            for place, told in _ledger(folder(work, f"read-{segment}", task))["steps"].items():
                steps[int(place)].merge(told)
    audits = [{**step.audit(), "params": _told(told)} for told, step in zip(plan.steps, steps, strict=True)]
    for number, place in enumerate(plan.corpus):
        facts = json.loads((folder(work, f"resolve-{number}", 0) / shuffle.FACTS).read_text()) if plan.tasks else {}
        audits[place]["facts"] = facts
    result = Result(plan, found, read, kept, audits, None, last_folders, first_folders)
    placing.place_first(result, work)
    return result


def _told(params: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key not in ("name", "evaluation", "models")}


def check_result(result: Result, share: float) -> None:
    """InputError if no document is left, or none for training."""
    if not result.kept.documents:
        raise InputError("the corpus is empty: no document with text" + _why_empty(result), hint=_hint(result))
    if not result.splits.get("train"):
        raise InputError("no document is left for training", hint="lower validation_share or add documents")


def _why_empty(result: Result) -> str:
    dropped = sum(sum(step["dropped"].values()) for step in result.steps)
    if dropped:
        return f"; the steps dropped all {dropped:,} that were read"
    rejects = list(all_rejects(result, 1))
    count = sum(result.read.rejected.values())
    return f" ({count:,} rejects, the first: {rejects[0].where}: {rejects[0].detail})" if rejects else ""


def _hint(result: Result) -> str:
    first = next(iter(all_rejects(result, 1)), None)
    return first.hint if first is not None and first.hint else f"supported: {known_endings()}"


def all_rejects(result: Result, most: int | None = None) -> Iterator[Reject]:
    """What was rejected: while the files were listed, then task by task."""
    yield from islice(_rejects(result), most)


def _rejects(result: Result) -> Iterator[Reject]:
    yield from result.found.rejects
    for place in result.first_folders:
        with (place / tasks.REJECTS).open(encoding="utf-8") as lines:
            for line in lines:
                told = json.loads(line)
                if "note" not in told:
                    yield Reject(**told)


def all_notes(result: Result) -> Iterator[dict[str, str]]:
    """What was noted about files: {name, note, detail}."""
    for place in result.first_folders:
        with (place / tasks.REJECTS).open(encoding="utf-8") as lines:
            for line in lines:
                told = json.loads(line)
                if "note" in told:
                    yield told


def all_files(result: Result) -> Iterator[dict[str, Any]]:
    """Every file that was read: {name, source, format, bytes, documents, digest}; parts of large ones together."""
    held: dict[str, Any] | None = None
    for place in result.first_folders:
        with (place / tasks.FILES).open(encoding="utf-8") as lines:
            for line in lines:
                told = json.loads(line)
                if (
                    held is not None
                    and (told["name"], told["source"]) == (held["name"], held["source"])
                    and told["part"]
                ):
                    held["bytes"] += told["bytes"]
                    held["documents"] += told["documents"]
                    continue
                if held is not None:
                    yield held
                held = told
                held.pop("part")
    if held is not None:
        yield held


def write_dataset(result: Result, directory: Path, share: float) -> None:
    """The dataset `text` out of the parts: the members of its files, in the order of the tasks."""
    order = ("train", "validation") if share > 0 else ("train",)
    columns: list[str] = []
    told = [_ledger(place) for place in result.folders]
    for counts in told:
        columns += [name for name in counts["columns"] if name not in columns]

    def members() -> Iterator[tuple[str, Path | bytes, int, int, int]]:
        for number, (place, counts) in enumerate(zip(result.folders, told, strict=True)):
            first = parts.first_of(place)
            if first is not None and (result.last is None or number != result.last["task"]):
                yield _member(first)
            for split, numbers in counts["splits"].items():
                yield split, place / parts.ROWS.format(split), numbers["rows"], numbers["bytes"], numbers["written"]
        if result.last is not None:
            yield _member(result.last)

    for told_first in filter(None, map(parts.first_of, result.folders)):
        columns += [name for name in told_first["row"] if name not in columns]
    join_members(directory, "dataset.text", order, members(), columns)


def _member(told: dict[str, Any]) -> tuple[str, bytes, int, int, int]:
    packed, written = pack_row(told["row"])
    return told["split"], packed, 1, size_of(told["row"]["text"]), written
