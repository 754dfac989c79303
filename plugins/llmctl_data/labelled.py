"""Labelled examples: rows of files with their fields renamed, or of a toy, written with their splits."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.store.types import LABELLED
from llmctl.text.datasets import DatasetWriter, read_lines, read_records, row_texts
from llmctl.text.labelled import checked
from llmctl_data.facts import rank
from llmctl_data.params import DataParams, LabelledParams
from llmctl_data.readers import RECORDS, Document, list_files
from llmctl_data.shards import OtherInputs, told_steps
from llmctl_data.toys import LARGEST, TOYS

if TYPE_CHECKING:
    from llmctl_data.run import Spool

Row = dict[str, Any]
TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
FURTHER = ("pair", "start", "split")
"""Columns that a row may have beside those of its task."""


@dataclass(frozen=True)
class Labelled:
    """A row with the name that decides its split."""

    id: str
    source: str
    row: Row


def write_labelled(
    ctx: Context, params: DataParams, files: Sequence[Artifact], out: Spool, others: OtherInputs
) -> list[dict[str, Any]]:
    """Write all rows to the output `labelled`, and each of their texts as a document; what the audit says of steps."""
    rows = toy_rows(params) if params.reader in TOYS else file_rows(files, params.labelled or LabelledParams())
    kept: dict[str, list[Labelled]] = {"train": [], "validation": []} if params.validation_share else {"train": []}
    for example in rows:
        document = Document(example.id, example.source, "", example.id, str(example.row.get("split") or ""))
        kept.setdefault(out.split_of(document), []).append(example)
    if params.negative_twin == "shuffled-labels":
        kept["train"] = list(shuffled(kept["train"], params.seed))
    audits: list[dict[str, Any]] = []
    if params.steps:
        from llmctl_data.labelled_steps import take_steps

        kept["train"], audits = take_steps(kept["train"], told_steps(params, others), params.seed)
    for split, examples in kept.items():
        for example in examples:
            for number, text in enumerate(row_texts(example.row)):
                out.add(Document(f"{example.id}/{number}", example.source, text, meta=known_of(example.row)), split)
    if not ctx.wants("labelled"):
        return audits
    with DatasetWriter(ctx.output("labelled"), "dataset.labelled", tuple(kept)) as writer:
        for split, examples in kept.items():
            for example in examples:
                writer.add(split, {"id": example.id, **{k: v for k, v in example.row.items() if k != "split"}})
    ctx.describe("labelled", rows=sum(map(len, kept.values())))
    ctx.report({f"labelled.{split}": len(examples) for split, examples in kept.items()})
    return audits


def known_of(row: Row) -> Row:
    """What a document that is made of a row keeps of it: its class, and where it comes from."""
    return {name: row[name] for name in ("label", "parent", "method") if name in row}


def toy_rows(params: DataParams) -> Iterator[Labelled]:
    """The rows of a toy. UsageError for more of them than it can make."""
    most = LARGEST[params.reader]
    if params.rows > most:
        raise UsageError(f"{params.reader} makes up to {most} different rows, not {params.rows}", hint="lower rows")
    for number, row in enumerate(TOYS[params.reader](params.rows, params.seed)):
        yield Labelled(f"{params.reader}-{number}", params.reader, row)


def file_rows(files: Sequence[Artifact], params: LabelledParams) -> Iterator[Labelled]:
    """The rows of all files, checked, under our names. InputError names file and row of what does not fit."""
    for name, path in list_files(files, (*RECORDS, *TABLES)):
        records = read_table(path) if path.name.lower().endswith(TABLES) else read_records(path)
        for number, record in records:
            where = f"{path}:{number}"
            row = checked(params.task, renamed(record, params, where), where)
            yield Labelled(f"{name}#{number}", name, row)


def renamed(record: Mapping[str, Any], params: LabelledParams, where: str) -> Row:
    """Our columns of a record, by `fields`; those that are not named there keep their name."""
    wanted = (*LABELLED[params.task], *FURTHER)
    for ours, theirs in params.fields.items():
        if theirs not in record:
            raise InputError(
                f"{where}: no column `{theirs}`, which fields names for `{ours}`",
                hint=f"columns here: {', '.join(sorted(map(str, record))) or 'none'}",
            )
    found = {ours: record[params.fields.get(ours, ours)] for ours in wanted if params.fields.get(ours, ours) in record}
    # A table cannot leave a cell out, and null is a way to say nothing.
    found = {name: value for name, value in found.items() if name not in FURTHER or value not in (None, "")}
    if params.task == "token-classification":
        # A table has no lists; there the words of a cell are.
        found = {k: v.split() if k in ("tokens", "labels") and isinstance(v, str) else v for k, v in found.items()}
    return found


def read_table(path: Path) -> Iterator[tuple[int, Row]]:
    """(line of its end, row by the names of the first line) of a comma- or tab-separated file."""
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        head = next(reader, None)
        if head is None:
            raise InputError(f"{path} is empty", hint="the first line names the columns")
        for cells in filter(None, reader):
            if len(cells) != len(head):
                raise InputError(f"{path}:{reader.line_num}: {len(cells)} cells, the first line names {len(head)}")
            yield reader.line_num, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{path}:{reader.line_num}: {error}", hint="quote cells that hold quotes or line ends"
        ) from error


def shuffled(examples: Sequence[Labelled], seed: int) -> Iterator[Labelled]:
    """Every row with the answer of another: what is learnt from them must be worth nothing.

    The labels of tokens are dealt anew within their row: another's would be too many or too few.
    """
    order = sorted(range(len(examples)), key=lambda number: rank(seed, "shuffled", number))
    for example, other in zip(examples, order, strict=True):
        names = [name for name in ("label", "target", "positive") if name in example.row]
        dealt: dict[str, Any] = {name: examples[other].row[name] for name in names}
        if "labels" in example.row:
            labels = example.row["labels"]
            places = sorted(range(len(labels)), key=lambda place: rank(seed, example.id, place))
            dealt["labels"] = [labels[place] for place in places]
        yield Labelled(example.id, example.source, {**example.row, **dealt})
