"""The split that would stay empty: the first document fills it, with everything that is of one unit with it.

Splits go by hash, so that in a small corpus, or with a small share, one of them may have no document. What belongs
together (copies by weight, repeated and derived documents, pieces of one file) stays together then, too: a copy of what
is measured on must not be trained on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.text.documents import Document
from llmctl_data import parts, tasks
from llmctl_data.ledger import DocumentLedger, merged, size_of

if TYPE_CHECKING:
    from llmctl_data.shards import Result

PLACED = "placed"


def place_first(result: Result, work: Path) -> None:
    """Decide the split of the very first document, which comes last, and count those that tasks have set aside.

    What the stage itself has made stays as it is.
    """
    firsts = [(number, told) for number, place in enumerate(result.folders) if (told := parts.first_of(place))]
    if firsts and not result.found.spooled:
        number, told = firsts[0]
        split = _split(result, firsts)
        if split != told["split"]:
            _move(result, work, told["unit"], split)
            firsts = [(number, parts.first_of(result.folders[number]) or told) for number, told in firsts]
        result.last = {**told, "split": split, "task": number}
        firsts[0] = (number, result.last)
    for _, told in firsts:
        document = Document(told["row"]["id"], "", told["row"]["text"], meta=told["row"].get("meta") or {})
        result.kept.add(document, size_of(document.text), split=told["split"], **told["known"])
    result.splits = {split: counts[0] for split, counts in result.kept.groups["split"].items()}


def _split(result: Result, firsts: list[tuple[int, dict[str, Any]]]) -> str:
    """The split of the first document: its own, or the one that would be empty; a single unit is for training."""
    own: str = firsts[0][1]["split"]
    used = {*result.kept.groups["split"], *(told["split"] for _, told in firsts[1:])}
    if firsts[0][1]["fixed"] or result.plan.validation_share == 0 or not used <= {own}:
        return own
    unit = firsts[0][1]["unit"]
    alone = all(told["unit"] == unit for _, told in firsts) and all(
        (parts.units_of(place) == parts.unit_key(unit)).all() for place in result.folders
    )
    return "train" if alone or own == "validation" else "validation"


def _move(result: Result, work: Path, unit: str, split: str) -> None:
    """Give every document of the unit this split; what its tasks left is written once more, beside it."""
    for number, place in enumerate(result.folders):
        first = parts.first_of(place)
        if (first is not None and first["unit"] == unit) or (parts.units_of(place) == parts.unit_key(unit)).any():
            target = work / PLACED / f"{number:06d}"
            if not target.is_dir():
                aside = target.with_name(f".{target.name}")
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                _rewrite(place, aside, unit, split)
                tasks.publish(aside, target)
            result.folders[number] = target
    ledgers = (json.loads((place / tasks.LEDGER).read_text(encoding="utf-8")) for place in result.folders)
    result.kept = merged(DocumentLedger, (told["kept"] for told in ledgers))


def _rewrite(place: Path, out: Path, unit: str, split: str) -> None:
    """What a task left, with the documents of the unit in `split`; one row is held at a time."""
    told = json.loads((place / tasks.LEDGER).read_text(encoding="utf-8"))
    key = parts.unit_key(unit)
    rows = parts.RowFiles(out)
    if first := parts.first_of(place):
        rows.write_first({**first, "split": split if first["unit"] == unit else first["split"]})
    units: np.ndarray = parts.units_of(place)
    for (row, was), own in zip(parts.rows_of(place, list(told["splits"])), units.tolist(), strict=True):
        rows.add_row(row, own, split if own == key else was, size_of(row["text"]))
    rows.close()
    told["splits"] = rows.splits
    told["kept"]["groups"]["split"] = {name: [one["rows"], one["bytes"]] for name, one in rows.splits.items()}
    (out / tasks.LEDGER).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
