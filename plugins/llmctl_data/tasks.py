"""The tasks of a plan, each from files to a directory of files: `python -m llmctl_data.tasks WORK PHASE NUMBER`.

`read-K` reads documents (K = 0) or takes them from the segment before, applies that segment's steps and writes what is
left; `match-K` and `resolve-K` are the phases of the K-th corpus step. With `--serve WORK`, lines `PHASE NUMBER` on
standard input are done one after the other, an answer in JSON for each; the end of the input ends the process.

What a task holds. `read`: a batch of documents, the line or the file that is read (at most `max_document_bytes`), the
signatures of its own documents, the verdicts over them, and what the corpus step gives to all (the lines that
`repeated-lines` removes). `match`: the signatures of a range of keys, about `MATCH_BYTES`, but at least one of 256
buckets, so with more than 256 times that in all it grows with the corpus. `resolve`: everything that matching found,
which grows with the duplicates and the items found, not with the documents that have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmctl.errors import LlmctlError, StageError
from llmctl.stage import Artifact
from llmctl.text.cleaning.step import BatchStep, CorpusStep, Drop, Noted, Several, Step
from llmctl.text.documents import Document
from llmctl_data import shuffle
from llmctl_data.facts import unit
from llmctl_data.ledger import DocumentLedger, ReadLedger, StepLedger, size_of
from llmctl_data.parts import DOCUMENTS, DocumentFile, RowFiles, read_documents
from llmctl_data.plan import Plan, folder, pieces_of
from llmctl_data.readers.piece import Note, Piece, Reject
from llmctl_data.readers.read import read_piece
from llmctl_data.readers.streams import is_url

BATCH, BATCH_CHARS = 64, 1 << 20
"""Documents that go through the steps together, and the characters at which fewer do."""
LEDGER, REJECTS, FILES = "ledger.json", "rejects.jsonl", "files.jsonl"
Known = dict[str, str]
"""Source and format of a document: they survive whatever a step makes of it."""


def publish(aside: Path, target: Path) -> None:
    """Give what a task made its name. Where another worker was faster, the same bytes lie there already.

    StageError if it can get none: without it the documents of the task would be missing.
    """
    try:
        aside.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise StageError(
                f"{target} cannot be written: {error.strerror or error}",
                hint="look at the free space and the permissions of the store; the same command goes on from here",
            ) from error


class Worker:
    """Does the tasks of one plan; its steps are made once, when the first document needs them."""

    def __init__(self, work: Path) -> None:
        self.work, self.plan = work, Plan.read(work)
        self._steps: dict[int, Step | CorpusStep] = {}

    def step(self, place: int) -> Any:
        """The step at this place of the list."""
        if place not in self._steps:
            self._steps[place] = build_step(self.plan.steps[place], self.plan.seed)
        return self._steps[place]

    def _ledger(self, place: int) -> StepLedger:
        """An empty ledger of the step at this place."""
        masks = any(told["name"] == "pii" for told in self.plan.steps)
        return StepLedger(self.plan.steps[place]["name"], place, self.plan.seed, masks)

    def do(self, phase: str, number: int) -> None:
        """Do one task, unless it is done. Raises LlmctlError for what a user can act on."""
        target = folder(self.work, phase, number)
        if target.is_dir():
            return
        kind, _, segment = phase.partition("-")
        aside = target.with_name(f".{target.name}-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            {"read": self._read, "match": self._match, "resolve": self._resolve}[kind](int(segment), number, aside)
            publish(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _read(self, segment: int, number: int, out: Path) -> None:
        with contextlib.ExitStack() as stack:
            self._read_into(segment, number, out, stack)

    def _read_into(self, segment: int, number: int, out: Path, stack: contextlib.ExitStack) -> None:
        places = self.plan.steps_of(segment)
        ledgers = {place: self._ledger(place) for place in places}
        reading = Reading(self.plan, out) if segment == 0 else None
        if reading is not None:
            stack.callback(reading.close)
        documents: Iterable[tuple[Document, Known]]
        if reading is not None:
            documents = reading.documents(pieces_of(self.work, number))
        else:
            place = self.plan.corpus[segment - 1]
            ledgers = {place: self._ledger(place), **ledgers}
            documents = self._filtered(segment, number, ledgers[place])
        steps = [(self.step(place), ledgers[place]) for place in places]
        cleaned = through(documents, steps)
        if segment < len(self.plan.corpus):
            told = self._hand_on(cleaned, self.step(self.plan.corpus[segment]), out)
        else:
            told = self._write_rows(cleaned, out)
        told["steps"] = {str(place): ledger.to_json() for place, ledger in ledgers.items()}
        if reading is not None:
            told["read"] = reading.ledger.to_json()
        (out / LEDGER).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")

    def _filtered(self, segment: int, number: int, ledger: StepLedger) -> Iterator[tuple[Document, Known]]:
        """The documents of the segment before, as the corpus step between decided."""
        step: CorpusStep = self.step(self.plan.corpus[segment - 1])
        decided = folder(self.work, f"resolve-{segment - 1}", 0)
        verdicts, shared = shuffle.read_verdicts(decided, number)
        path = folder(self.work, f"read-{segment - 1}", number) / DOCUMENTS
        for place, (document, known) in enumerate(read_documents(path)):
            if not self._concerns(step, document):
                ledger.count(document, document)
                yield document, known
                continue
            outcome = step.filter(document, verdicts.get(place), shared)
            if isinstance(outcome, Document | Drop | Noted):
                after = ledger.count(document, outcome)
                if after is not None:
                    yield after, known
            else:
                several = outcome if isinstance(outcome, Several) else Several(outcome, {"copies": len(outcome) - 1})
                ledger.copies(document, several)
                for copy in several.documents:
                    yield copy, known

    def _concerns(self, step: CorpusStep, document: Document) -> bool:
        """Whether the step may see the document: some leave alone what is measured on."""
        if not getattr(step, "training_only", False):
            return True
        return (document.split or split_by_hash(self.plan.seed, self.plan.validation_share, document)) == "train"

    def _hand_on(self, documents: Iterable[tuple[Document, Known]], step: CorpusStep, out: Path) -> dict[str, Any]:
        """Write the documents for the next segment, and their signatures."""
        signatures = shuffle.SignatureWriter()
        with contextlib.closing(DocumentFile(out)) as file:
            for document, known in documents:
                for key, payload in step.signatures(document) if self._concerns(step, document) else ():
                    signatures.add(key, file.count, payload)
                file.add(document, known)
        signatures.write(out)
        return {"documents": file.count}

    def _write_rows(self, documents: Iterable[tuple[Document, Known]], out: Path) -> dict[str, Any]:
        """Write the rows of the dataset."""
        rows, ledger = RowFiles(out), DocumentLedger()
        first = True
        with contextlib.closing(rows):
            for document, known in documents:
                split = document.split or split_by_hash(self.plan.seed, self.plan.validation_share, document)
                if first:
                    rows.set_aside(document, split, known)
                    first = False
                    continue
                size = size_of(document.text)
                rows.add(document, split, size)
                ledger.add(document, size, split=split, **known)
        return {"kept": ledger.to_json(), "splits": rows.splits, "columns": rows.columns}

    def _match(self, place: int, number: int, out: Path) -> None:
        step: CorpusStep = self.step(self.plan.corpus[place])
        folders = [folder(self.work, f"read-{place}", task) for task in range(self.plan.tasks)]
        signatures = shuffle.load_range(folders, *shuffle.ranges(folders)[number])
        with (out / shuffle.FINDINGS).open("w", encoding="utf-8") as file:
            for finding in step.match(signatures):
                file.write(json.dumps(finding) + "\n")

    def _resolve(self, place: int, number: int, out: Path) -> None:
        step: CorpusStep = self.step(self.plan.corpus[place])
        matched = sorted(path for path in (self.work / f"match-{place}").iterdir() if not path.name.startswith("."))
        shuffle.write_resolution(step.resolve(shuffle.read_findings(matched)), out)


class Reading:
    """Documents of the pieces of a task, with what could not be read beside them."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self._plan = plan
        self.ledger = ReadLedger()
        self._rejects = (out / REJECTS).open("w", encoding="utf-8")
        self._files = (out / FILES).open("w", encoding="utf-8")
        self._read: Counter[str] = Counter()

    def documents(self, pieces: Sequence[Piece]) -> Iterator[tuple[Document, Known]]:
        """All documents, each as often as the weight of its source says."""
        for piece in pieces:
            limit = piece.options.get("limit")
            if limit and self._read[piece.source] >= limit:
                continue
            known = {"source": piece.source, "format": piece.format.removeprefix("reader:")}
            count = 0
            for document in self._piece(piece):
                count += 1
                self._read[piece.source] += 1
                self.ledger.document(piece.source)
                copies = self._copies(piece, document)
                self.ledger.taken(piece.source, copies)
                for copy in range(copies):
                    yield (replace(document, id=f"{document.id}~{copy + 1}") if copy else document), known
                if limit and self._read[piece.source] >= limit:
                    break
            self.ledger.piece(piece.source, piece.size, piece.part == 0)
            self._note_file(piece, count)

    def _piece(self, piece: Piece) -> Iterator[Document]:
        for item in read_piece(piece):
            if isinstance(item, Document):
                yield item
            elif isinstance(item, Reject):
                if item.fault and self._plan.on_error == "fail":
                    raise item.error(piece.path)
                self.ledger.reject(item)
                self._rejects.write(json.dumps(item.to_json(), ensure_ascii=False) + "\n")
            else:
                self._note(item)

    def _note(self, note: Note) -> None:
        self.ledger.note(note)
        told = {"name": note.name, "note": note.kind, "detail": note.detail}
        self._rejects.write(json.dumps(told, ensure_ascii=False) + "\n")

    def _copies(self, piece: Piece, document: Document) -> int:
        weight = float(piece.options.get("weight", 1.0))
        if weight == 1.0:
            return 1
        return int(weight) + (unit(self._plan.seed, "weight", document.id) < weight % 1)

    def _note_file(self, piece: Piece, documents: int) -> None:
        told = {"name": piece.name, "source": piece.source, "format": piece.format, "part": piece.part}
        known = piece.options.get("digest")  # where the file was read to be cut, and where none is wanted
        digest = "" if piece.part else digest_of(piece) if known is None else known
        told |= {"bytes": piece.size, "documents": documents, "digest": digest}
        self._files.write(json.dumps(told, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Finish the files."""
        self._rejects.close()
        self._files.close()


def digest_of(piece: Piece) -> str:
    """`sha256:…` of a local file, what its store says of a remote one, "" if it cannot be told."""
    if is_url(piece.path):
        from llmctl_data.remote import digest_of

        return digest_of(piece.path)
    try:
        with Path(piece.path).open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError:
        return ""  # it has been rejected


def split_by_hash(seed: int, share: float, document: Document) -> str:
    """The split of a document that has none of its own: by hash of its unit."""
    return "validation" if unit(seed, "split", document.unit or document.source) < share else "train"


def through(
    documents: Iterable[tuple[Document, Known]], steps: Sequence[tuple[Step, StepLedger]]
) -> Iterator[tuple[Document, Known]]:
    """Documents after all steps, a batch at a time."""
    if not steps:
        yield from documents
        return
    batched = [isinstance(step, BatchStep) for step, _ in steps]
    batch: list[tuple[Document, Known]] = []
    size = 0
    for document, known in documents:
        batch.append((document, known))
        size += len(document.text)
        if len(batch) >= BATCH or size >= BATCH_CHARS:
            yield from _clean(batch, steps, batched)
            batch, size = [], 0
    yield from _clean(batch, steps, batched)


def _clean(
    batch: list[tuple[Document, Known]], steps: Sequence[tuple[Step, StepLedger]], batched: Sequence[bool]
) -> list[tuple[Document, Known]]:
    for (step, ledger), together in zip(steps, batched, strict=True):
        if not batch:
            return batch
        documents = [document for document, _ in batch]
        outcomes = step.batch(documents) if together else map(step, documents)  # type: ignore[attr-defined]  # `together`
        left = []
        for (document, known), outcome in zip(batch, outcomes, strict=True):
            after = ledger.count(document, outcome)
            if after is not None:
                left.append((after, known))
        batch = left
    return batch


def build_step(told: dict[str, Any], seed: int) -> Step | CorpusStep:
    """The step that its parameters, as JSON, describe; `evaluation` and `models` among them are its other inputs."""
    import pydantic

    from llmctl.text.cleaning.catalogue import build
    from llmctl.text.cleaning.params import AnyStep

    params = {name: value for name, value in told.items() if name not in ("evaluation", "models")}
    return build(
        pydantic.TypeAdapter(AnyStep).validate_python(params),
        seed,
        [Path(path) for path in told.get("evaluation", ())],
        [Artifact(Path(path), kind) for path, kind in told.get("models", ())],
    )


def serve(work: Path) -> None:
    """Do what standard input asks for, until it ends."""
    worker = Worker(work)
    for line in sys.stdin:
        phase, number = line.split()
        answer: dict[str, Any] = {"phase": phase, "number": int(number)}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # a library's print must not look like an answer
                worker.do(phase, int(number))
        except LlmctlError as error:
            answer |= {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def main(words: Sequence[str]) -> int:
    """One task, or many; 0 or the exit code of the error."""
    if len(words) == 2 and words[0] == "--serve":
        from llmctl.launch.guard import die_with

        die_with(os.getppid())
        serve(Path(words[1]))
        return 0
    if len(words) != 3:
        sys.stderr.write("usage: python -m llmctl_data.tasks WORK PHASE NUMBER | --serve WORK\n")
        return 2
    try:
        Worker(Path(words[0])).do(words[1], int(words[2]))
    except LlmctlError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"  hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
