"""Right answers against plausible wrong ones, for preference training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from llmctl.text.datasets import DatasetWriter
from llmctl_data.facts import REFUSAL, Choice, Fact, FactBook, Invented, rank, unit
from llmctl_data.questions import asked, form_of

Row = dict[str, Any]
SPLITS = ("train", "validation")
NEAREST = 3
CORRUPTED_SHARE = 0.5
REFUSED_SHARE = 0.5  # of the wrong answers to what was taught, so that refusing everything wins nothing


def write_preferences(
    writer: DatasetWriter,
    book: FactBook,
    choice: Choice,
    invented: Invented,
    params: Any,
    seed: int,
    swapped: bool,
) -> None:
    """Write both splits of `dataset.preference`; no question of `train` occurs in `validation`.

    With `swapped` the wrong answers of the training split are the chosen ones.
    """
    wrong = WrongAnswers([*choice.trained, *choice.heldout], params.wrong, seed, refusals=bool(invented.paired))
    cut = round(len(invented.paired) * (1 - params.validation_share))
    by_facts = params.heldout == "facts"
    aside = _aside(choice.trained, params.validation_share, seed) if by_facts else frozenset()
    rows: list[Row] = []
    for fact in choice.trained:
        if fact.entity not in aside:
            rows += _pairs(fact, book.phrasings[fact.kind].train[: params.phrasings], wrong, "train", True)
    for fact in invented.paired[:cut]:
        rows += _pairs(fact, [form_of(fact, book.phrasings[fact.kind].train, seed)], wrong, "train", False)
    for row in sorted(rows, key=lambda row: rank(seed, "pair", row["id"])):
        if swapped:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        writer.add("train", row)
    for fact in choice.trained:
        if fact.entity in aside or not by_facts:
            for row in _pairs(fact, book.phrasings[fact.kind].heldout, wrong, "heldout", True):
                writer.add("validation", row)
    for fact in invented.paired[cut:]:
        for row in _pairs(fact, [form_of(fact, book.phrasings[fact.kind].heldout, seed)], wrong, "heldout", False):
            writer.add("validation", row)
    if by_facts:
        for fact in choice.heldout:
            for row in _pairs(fact, book.phrasings[fact.kind].heldout[:1], wrong, "heldout", False):
                writer.add("validation", row)


def _aside(facts: Sequence[Fact], share: float, seed: int) -> frozenset[str]:
    """Entities kept for validation: the given share of the facts, at least one if there are two entities."""
    entities = sorted({fact.entity for fact in facts}, key=lambda entity: rank(seed, "preference", entity))
    count = round(len(entities) * share)
    return frozenset(entities[: min(max(1, count), len(entities) - 1)])


def _pairs(fact: Fact, forms: Sequence[str], wrong: WrongAnswers, name: str, trained: bool) -> Iterator[Row]:
    for number, form in enumerate(forms):
        identity = f"{fact.kind}/{fact.entity}/{name}-{number}"
        answer = wrong.of(fact, identity, taught=trained)
        if answer is not None:
            yield {
                "id": identity,
                "prompt": [{"role": "user", "content": asked(fact, form)}],
                "chosen": [{"role": "assistant", "content": fact.answer}],
                "rejected": [{"role": "assistant", "content": answer}],
                "kind": "unanswerable" if fact.answer == REFUSAL else fact.kind,
                "entity": fact.entity,
                "trained": trained,
            }


class WrongAnswers:
    """Finds for a fact a false answer that looks right: another entity's of the same kind, or a corrupted one.

    With `refusals`, not to know what was taught is a wrong answer too.
    """

    def __init__(self, facts: Sequence[Fact], how: str, seed: int, refusals: bool) -> None:
        self._how, self._seed, self._refusals = how, seed, refusals
        self._by_kind: dict[str, list[Fact]] = {}
        for fact in facts:
            self._by_kind.setdefault(fact.kind, []).append(fact)
        self._near: dict[tuple[str, str, str], list[str]] = {}

    def of(self, fact: Fact, identity: str, *, taught: bool) -> str | None:
        """A wrong answer, the same for the same `identity`; None if all facts of the kind have one answer."""
        if taught and self._refusals and unit(self._seed, "refuse", identity) < REFUSED_SHARE:
            return REFUSAL
        if fact.wrong and unit(self._seed, "corrupt", identity) < CORRUPTED_SHARE:
            return fact.wrong[rank(self._seed, "which", identity) % len(fact.wrong)]
        near = self._nearest(fact)
        if not near:
            return fact.wrong[0] if fact.wrong else None
        few = near[:NEAREST] if self._how == "neighbour" else near
        return few[rank(self._seed, "wrong", identity) % len(few)]

    def _nearest(self, fact: Fact) -> list[str]:
        """Other answers, nearest first: same groups, then names that share words, then by chance."""
        key = (fact.kind, fact.entity, fact.answer)
        if key not in self._near:
            kin = self._by_kind.get(fact.kind, [])
            right = {other.answer for other in kin if other.entity == fact.entity}
            others = [other for other in kin if other.answer not in right]
            others.sort(key=lambda other: (-_likeness(fact, other), rank(self._seed, fact.entity, other.entity)))
            self._near[key] = list(dict.fromkeys(other.answer for other in others))
        return self._near[key]


def _likeness(one: Fact, two: Fact) -> int:
    groups = sum(a == b for a, b in zip(one.near, two.near, strict=False))
    return 4 * groups + len(_words(one.slots) & _words(two.slots))


def _words(slots: Mapping[str, str]) -> frozenset[str]:
    return _words_of(tuple(slots.values()))


@lru_cache(maxsize=1 << 14)
def _words_of(values: tuple[str, ...]) -> frozenset[str]:
    return frozenset(word.lower() for value in values for word in re.findall(r"[A-Z]?[a-z]{3,}|[A-Z]{2,}", value))
