"""The plan of a run over shards: everything that a task needs to know, in files of the stage's work directory.

    plan.json            what holds for all tasks: seed, shares, steps
    tasks/000000.json    the pieces of one task
    read-0/000000/       what the task left: documents, counts, rejects, signatures for the first corpus step
    match-0/0000/        findings over a range of the signatures' keys
    resolve-0/           what the corpus step decided, a file of verdicts for every task
    read-1/000000/       documents after that decision and the steps that follow, and so on

A directory gets its name when all in it is written, so one that is there is finished, and a run that was killed goes on
with those that are not. The plan depends on the files and the parameters alone; no result depends on how many workers
there were or who did what.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmctl_data.readers.piece import SPOOL, Piece

FILE = "plan.json"
MOST_PIECES = 2000
"""Files of one task: opening one takes time, too."""


@dataclass(frozen=True)
class Plan:
    """What holds for all tasks."""

    seed: int
    validation_share: float
    on_error: str
    steps: list[dict[str, Any]]
    """The parameters of each step, in order."""
    corpus: list[int]
    """Which of them are corpus steps."""
    tasks: int
    fingerprint: str

    @property
    def segments(self) -> int:
        """How often all documents pass by."""
        return len(self.corpus) + 1

    def steps_of(self, segment: int) -> range:
        """The places of the ordinary steps of a segment."""
        start = 0 if segment == 0 else self.corpus[segment - 1] + 1
        return range(start, self.corpus[segment] if segment < len(self.corpus) else len(self.steps))

    @classmethod
    def read(cls, work: Path) -> Plan:
        """The plan in a work directory."""
        return cls(**json.loads((work / FILE).read_text(encoding="utf-8")))


def pack(pieces: Sequence[Piece], task_bytes: int) -> Iterator[list[Piece]]:
    """Pieces of about `task_bytes` together, in order; those of a source with a limit are one task, at the end."""
    limited: dict[str, list[Piece]] = {}
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        if piece.options.get("limit"):
            limited.setdefault(piece.source, []).append(piece)
            continue
        if held and (size + piece.size > task_bytes or len(held) >= MOST_PIECES):
            yield held
            held, size = [], 0
        held.append(piece)
        size += piece.size
    if held:
        yield held
    yield from limited.values()


def make_plan(
    work: Path, pieces: Sequence[Piece], task_bytes: int, facts: Mapping[str, Any], corpus: Sequence[int]
) -> Plan:
    """Write the plan; what a run with another plan has left in `work` is removed first."""
    tasks = list(pack(pieces, task_bytes))
    told = [[piece.to_json() for piece in task] for task in tasks]
    stats = [_state(piece) for piece in pieces]
    text = json.dumps([dict(facts), list(corpus), told, stats], sort_keys=True)
    plan = Plan(**facts, corpus=list(corpus), tasks=len(tasks), fingerprint=hashlib.sha256(text.encode()).hexdigest())
    if (work / FILE).is_file() and Plan.read(work) == plan:
        return plan
    shutil.rmtree(work, ignore_errors=True)
    (work / "tasks").mkdir(parents=True)
    for number, task in enumerate(told):
        (work / "tasks" / f"{number:06d}.json").write_text(json.dumps(task), encoding="utf-8")
    aside = work / f".{FILE}"
    aside.write_text(json.dumps(asdict(plan)), encoding="utf-8")
    aside.replace(work / FILE)
    return plan


def _state(piece: Piece) -> list[Any]:
    """What changes when a local file does; one that the stage itself writes anew in every run is known by its bytes."""
    try:
        if piece.format == SPOOL:
            with Path(piece.path).open("rb") as file:
                return [hashlib.file_digest(file, "sha256").hexdigest()]
        status = Path(piece.path).stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def pieces_of(work: Path, number: int) -> list[Piece]:
    """The pieces of one task."""
    return [Piece(**told) for told in json.loads((work / "tasks" / f"{number:06d}.json").read_text(encoding="utf-8"))]


def folder(work: Path, phase: str, number: int) -> Path:
    """Where a task of a phase (`read-0`, `match-0`, `resolve-0`) leaves what it made."""
    return work / phase / f"{number:06d}"
