"""The steps that labelled rows take, `balance` and `augment`: as over shards, with all rows at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmctl import UsageError
from llmctl.text.cleaning.step import CorpusStep, Drop, Noted, Resolution, Several, Signatures
from llmctl.text.datasets import row_texts
from llmctl.text.documents import Document
from llmctl_data.labelled import Labelled
from llmctl_data.ledger import StepLedger
from llmctl_data.tasks import build_step

NOT_PARAMS = ("name", "evaluation", "models")


def take_steps(
    examples: Sequence[Labelled], steps: Sequence[Mapping[str, Any]], seed: int
) -> tuple[list[Labelled], list[dict[str, Any]]]:
    """(rows after all steps, what the audit says of each step). UsageError for a step that they cannot take."""
    rows, audits = list(examples), []
    for place, told in enumerate(steps):
        if told["name"] == "augment" and any(not isinstance(example.row.get("text"), str) for example in rows):
            raise UsageError("augment derives texts; these labelled rows have no column `text`", hint="use balance")
        step, ledger = build_step(dict(told), seed), StepLedger(told["name"], place, seed)
        rows, resolution = _take(rows, step, ledger)  # type: ignore[arg-type]  # both are corpus steps
        params = {name: value for name, value in told.items() if name not in NOT_PARAMS}
        audits.append({**ledger.audit(), "params": params, "facts": dict(resolution.facts)})
    return rows, audits


def _take(rows: Sequence[Labelled], step: CorpusStep, ledger: StepLedger) -> tuple[list[Labelled], Resolution]:
    documents = [_document(example) for example in rows]
    resolution = step.resolve(iter(list(step.match(_signatures(step, documents)))))
    verdicts = dict(resolution.verdicts)
    left: list[Labelled] = []
    for number, (example, document) in enumerate(zip(rows, documents, strict=True)):
        outcome = step.filter(document, verdicts.get(number), resolution.shared)
        if isinstance(outcome, Document | Drop | Noted):
            if ledger.count(document, outcome) is not None:
                left.append(example)
            continue
        several = outcome if isinstance(outcome, Several) else Several(outcome, {"copies": len(outcome) - 1})
        ledger.copies(document, several)
        left += [_row(example, document, one) for one in several.documents]
    return left, resolution


def _signatures(step: CorpusStep, documents: Sequence[Document]) -> Signatures:
    signed = [
        (key, number, payload)
        for number, document in enumerate(documents)
        for key, payload in step.signatures(document)
    ]
    signed.sort(key=lambda one: one[:2])
    keys, numbers = ([one[place] for one in signed] for place in (0, 1))
    return Signatures(np.array(keys, np.uint64), np.array(numbers, np.uint64), [one[2] for one in signed])


def _document(example: Labelled) -> Document:
    """What a step sees of a row: the text that it may change, or all of them, and the other columns as `meta`."""
    text = example.row.get("text")
    whole = text if isinstance(text, str) else "\n".join(row_texts(example.row))
    return Document(example.id, example.source, whole, meta={k: v for k, v in example.row.items() if k != "text"})


def _row(example: Labelled, before: Document, after: Document) -> Labelled:
    if after is before:
        return example
    row = {**example.row, "parent": after.meta["parent"], "method": after.meta["method"]}
    if after.text != before.text:
        row["text"] = after.text
    return replace(example, id=after.id, row=row)
