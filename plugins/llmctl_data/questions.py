"""Facts asked as conversations: phrasings trained on, phrasings and entities held out, questions nobody can answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmctl.text.datasets import DatasetWriter
from llmctl_data.facts import Choice, Fact, FactBook, Invented, Phrasings, rank, unit

Row = dict[str, Any]
SPLITS = ("train", "validation", "test", "unanswerable")


def asked(fact: Fact, form: str) -> str:
    """A phrasing with the fact's slots filled in (slots may hold braces, so this is no `str.format`)."""
    for name, value in fact.slots.items():
        form = form.replace("{" + name + "}", value)
    return form


def write_chat(
    writer: DatasetWriter,
    book: FactBook,
    choice: Choice,
    invented: Invented,
    params: Any,
    seed: int,
    shuffled: bool,
) -> None:
    """Write all splits of `dataset.chat`; with `shuffled` the training answers are dealt to the wrong questions."""
    answers = dealt(choice.trained, seed) if shuffled else {}
    train = [*_train(choice.trained, book.phrasings, params.phrasings, answers)]
    train += [_refusal(fact, book.phrasings[fact.kind].train, seed) for fact in invented.refused]
    for row in sorted(train, key=_shuffle(seed)):
        writer.add("train", row)
    for fact in choice.trained:
        for number, form in enumerate(book.phrasings[fact.kind].heldout):
            writer.add("validation", chat_row(fact, asked(fact, form), f"heldout-{number}"))
    for fact in choice.heldout:
        for number, form in enumerate(book.phrasings[fact.kind].heldout):
            writer.add("test", chat_row(fact, asked(fact, form), f"heldout-{number}"))
    for fact in invented.asked:
        writer.add("unanswerable", _refusal(fact, book.phrasings[fact.kind].heldout, seed))


def form_of(fact: Fact, forms: Sequence[str], seed: int) -> str:
    """One of `forms`, always the same for the same fact."""
    return forms[int(unit(seed, "form", fact.entity) * len(forms))]


def _refusal(fact: Fact, forms: Sequence[str], seed: int) -> Row:
    row = chat_row(fact, asked(fact, form_of(fact, forms, seed)), "invented")
    return {**row, "id": f"unanswerable/{fact.entity}", "kind": "unanswerable", "entity": ""}


def _train(
    facts: Sequence[Fact], phrasings: Mapping[str, Phrasings], count: int, answers: Mapping[int, str]
) -> Iterator[Row]:
    for index, fact in enumerate(facts):
        for number, form in enumerate(phrasings[fact.kind].train[:count]):
            yield chat_row(fact, asked(fact, form), str(number), answers.get(index))


def chat_row(fact: Fact, question: str, phrasing: str, answer: str | None = None) -> Row:
    """One conversation about a fact."""
    return {
        "id": f"{fact.kind}/{fact.entity}/{phrasing}",
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": fact.answer if answer is None else answer},
        ],
        "kind": fact.kind,
        "entity": fact.entity,
        "document": fact.document,
    }


def _shuffle(seed: int) -> Any:
    return lambda row: rank(seed, "row", row["id"])


def dealt(facts: Sequence[Fact], seed: int) -> dict[int, str]:
    """For each fact the answer of another one of its kind, each answer used as often as before, as few right as can be.

    The negative twin of training: what is learned from these answers is only how answers look.
    """
    wrong: dict[int, str] = {}
    for kind in sorted({fact.kind for fact in facts}):
        members = [index for index, fact in enumerate(facts) if fact.kind == kind]
        # Equal answers stand together; a turn by at least the largest group leaves none in its place.
        members.sort(key=lambda index: (facts[index].answer, rank(seed, "deal", facts[index].entity)))
        answers = [facts[index].answer for index in members]
        largest = max(answers.count(answer) for answer in set(answers))
        turn = largest + rank(seed, "turn", kind) % max(1, len(members) - 2 * largest + 1)
        for place, index in enumerate(members):
            wrong[index] = answers[(place + turn) % len(members)]
    return wrong
