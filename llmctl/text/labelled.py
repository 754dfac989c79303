"""Rows of `dataset.labelled`: what each task's rows hold, and the error for one that does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.store.types import LABELLED
from llmctl.text.datasets import Row, read_rows, splits

Task = Literal["classification", "token-classification", "question-answering", "seq2seq", "embedding"]
TASKS: tuple[Task, ...] = get_args(Task)


def task_of(row: Mapping[str, Any]) -> Task | None:
    """The task whose columns `row` has."""
    return next((task for task in TASKS if all(name in row for name in LABELLED[task])), None)


def checked(task: Task, row: Mapping[str, Any], where: str) -> Row:
    """`row` if it is one of `task`, an answer's `start` filled in; InputError, with `where`, says what is wrong."""
    missing = [name for name in LABELLED[task] if name not in row]
    if missing:
        raise InputError(
            f"{where}: no column `{missing[0]}`, which {task} needs",
            hint=f"columns here: {', '.join(sorted(map(str, row))) or 'none'}",
        )
    if task == "token-classification":
        return _checked_tokens(row, where)
    texts = [name for name in (*LABELLED[task], "pair") if name in row and name != "label"]
    for name in texts:
        if not isinstance(row[name], str):
            raise InputError(f"{where}: `{name}` is no text", hint=f"it is {row[name]!r}")
    if task == "classification" and (not isinstance(row["label"], str | int) or str(row["label"]) == ""):
        raise InputError(f"{where}: `label` is no name", hint=f"it is {row['label']!r}")
    if task == "question-answering":
        return {**row, "start": _start(row, where)}
    return {**row, "label": str(row["label"])} if task == "classification" else dict(row)


def _checked_tokens(row: Mapping[str, Any], where: str) -> Row:
    tokens, labels = row["tokens"], row["labels"]
    fine = all(isinstance(part, list) and all(isinstance(x, str | int) for x in part) for part in (tokens, labels))
    if not fine or len(tokens) != len(labels) or not tokens:
        raise InputError(
            f"{where}: `tokens` and `labels` are not two lists of equal length",
            hint='a row is {"tokens": ["Ada", "sang"], "labels": ["B-PER", "O"]}',
        )
    return {**row, "tokens": [str(token) for token in tokens], "labels": [str(label) for label in labels]}


def _start(row: Mapping[str, Any], where: str) -> int:
    """The first character of the answer: the one given, or the only place where it occurs."""
    context, answer, start = row["context"], row["answer"], row.get("start")
    if not answer:
        raise InputError(f"{where}: the answer is empty", hint="leave rows without an answer out")
    if start is None:
        if context.count(answer) != 1:
            raise InputError(
                f"{where}: the answer {answer!r} occurs {context.count(answer)} times in the context",
                hint="say where it starts: a column `start`, in characters",
            )
        return int(context.index(answer))
    place = int(start) if str(start).isdigit() else -1
    if place < 0 or context[place : place + len(answer)] != answer:
        raise InputError(f"{where}: at `start` {start} the context does not read {answer!r}")
    return place


def read_labelled(data: Artifact, split: str, task: Task | None = None) -> Iterator[Row]:
    """The rows of a split, checked; `task`: the one they must be of, by default that of the first row.

    InputError for a row that is not of the task.
    """
    for number, row in enumerate(read_rows(data, split), start=1):
        where = f"{data.path}: row {number} of `{split}`"
        task = task or task_of(row)
        if task is None:
            raise InputError(f"{where} is of no task", hint=f"columns here: {', '.join(sorted(row)) or 'none'}")
        yield checked(task, row, where)


def find_task(data: Artifact) -> Task:
    """The task of a dataset, by its first row. InputError if it is empty or of none."""
    for split in splits(data):
        for row in read_rows(data, split):
            if (task := task_of(row)) is None:
                raise InputError(
                    f"{data.path} is of no task that is known", hint=f"columns here: {', '.join(sorted(row)) or 'none'}"
                )
            return task
    raise InputError(f"{data.path} is empty", hint="give at least one row")
