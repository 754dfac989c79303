"""Questions about the standard library: which module provides X, what does X do, what is X's signature."""

from __future__ import annotations

import builtins
import re
import sys
from collections import Counter
from collections.abc import Sequence

from llmctl_data.facts import REFUSAL, Fact, FactBook, Phrasings, rank
from llmctl_data.pages import Page
from llmctl_data.stdlib import Entity, Module, compiled_names, first_sentence, identifiers, providers, source_files

MAX_SIGNATURE_CHARS = 56
DOC_WORDS = range(3, 17)

PHRASINGS = {
    "module": Phrasings(
        train=(
            "Which module provides `{name}`?",
            "Where is `{name}` defined?",
            "What module do I import `{name}` from?",
            "In which module can I find `{name}`?",
            "Name the module that contains `{name}`.",
            "I want to use `{name}`. Which module has it?",
            "`{name}` belongs to which module?",
            "Tell me the module of `{name}`.",
        ),
        heldout=("Which module contains `{name}`?", "From which module can I import `{name}`?"),
    ),
    "doc": Phrasings(
        train=(
            "What does `{name}` do?",
            "What is `{name}` for?",
            "Describe `{name}` in one sentence.",
            "Explain what `{name}` does.",
            "What is the purpose of `{name}`?",
            "Summarise what `{name}` does.",
            "Give a short description of `{name}`.",
            "I found `{name}` in some code. What does it do?",
        ),
        heldout=("Describe what `{name}` does.", "In one sentence, what is `{name}` for?"),
    ),
    "signature": Phrasings(
        train=(
            "What is the signature of `{name}`?",
            "Which arguments does `{name}` take?",
            "Show the signature of `{name}`.",
            "How do I call `{name}`? Show its parameters.",
            "What are the parameters of `{name}`?",
            "List the parameters of `{name}`.",
            "Which parameters does `{name}` accept?",
            "Write the signature of `{name}`.",
        ),
        heldout=("Which parameters does `{name}` take?", "Give me the signature of `{name}`."),
    ),
}


def fact_book(modules: Sequence[Module], pages: Sequence[tuple[Page, bool]], everything: Sequence[Module]) -> FactBook:
    """Candidate facts of `modules`; `pages` come with whether they are in the training split.

    `everything` is the whole library, because a name is asked about only if it means one thing in all of it.
    """
    page_of = {entity.qualified: (page, train) for page, train in pages for entity in page.entities}
    clear = _clear_entities(modules, everything)
    sentences = Counter(first_sentence(entity.doc) for entity in clear)
    candidates: list[Fact] = []
    for entity in clear:
        if entity.qualified not in page_of:
            continue
        page, train = page_of[entity.qualified]
        for kind, answer, wrong in _answers(entity, sentences):
            candidates.append(
                Fact(
                    kind=kind,
                    entity=entity.qualified,
                    slots={"name": entity.name},
                    answer=answer,
                    document=page.document.id,
                    near=(entity.module, _package(entity.module)),
                    wrong=wrong,
                    trainable=train,
                )
            )
    names = sorted({entity.name for entity in clear})
    return FactBook(candidates, PHRASINGS, lambda count, kinds: _invented(invented_names(names, count), kinds))


def _clear_entities(modules: Sequence[Module], everything: Sequence[Module]) -> list[Entity]:
    """Entities whose bare name means one thing: one module offers it, and no module, builtin or method is called so."""
    offered = providers(everything)
    taken = set(dir(builtins)) | set(sys.stdlib_module_names) | compiled_names()
    taken |= {part for module in everything for part in module.name.split(".")}
    methods: dict[str, set[str]] = {}
    for module in everything:
        methods.setdefault(_package(module.name), set()).update(module.methods)
    return [
        entity
        for module in modules
        for entity in module.entities
        if len(offered[entity.name]) == 1
        and len(entity.name) > 2
        and entity.name not in taken
        and entity.name not in methods[_package(module.name)]
    ]


def _package(module: str) -> str:
    return module.partition(".")[0]


def _answers(entity: Entity, sentences: Counter[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(kind, answer, corrupted answers) of what can be said for sure about an entity."""
    found: list[tuple[str, str, tuple[str, ...]]] = [("module", entity.module, ())]
    sentence = first_sentence(entity.doc)
    clean = sentence.isascii() and re.match(r"[A-Z][a-z]", sentence)
    if entity.certain and len(sentence.split()) in DOC_WORDS and clean and sentences[sentence] == 1:
        found.append(("doc", sentence, ()))
    if entity.certain and entity.plain and 2 < len(entity.signature) <= MAX_SIGNATURE_CHARS:
        found.append(("signature", entity.signature, corrupted(entity.signature)))
    return found


def corrupted(signature: str) -> tuple[str, ...]:
    """Signatures that are nearly right: two parameters swapped, one missing, another default."""
    parts = signature[1:-1].split(", ")
    forms = []
    if len(parts) > 1:
        forms.append([*parts[:-1]])
        if "=" not in parts[1] and not parts[1].startswith("*") and parts[1] != "/":
            forms.append([parts[1], parts[0], *parts[2:]])
    for old, new in (("=None", "=True"), ("=False", "=True"), ("=True", "=False"), ("=0", "=1")):
        if any(part.endswith(old) for part in parts):
            forms.append([part.removesuffix(old) + new if part.endswith(old) else part for part in parts])
    found = ("(" + ", ".join(form) + ")" for form in forms)
    return tuple(dict.fromkeys(form for form in found if form != signature))


def invented_names(names: Sequence[str], count: int) -> list[str]:
    """Up to `count` names made of the halves of two real ones, found nowhere in the library's source or builtins."""
    real = identifiers(source_files()) | compiled_names() | set(dir(builtins)) | set(sys.stdlib_module_names)
    lowered = {name.lower() for name in real}
    halves = [(name, found) for name in names if (found := _halves(name))]
    halves.sort(key=lambda item: rank("half", item[0]))
    made: dict[str, None] = {}
    if count == 0:
        return []
    for step in range(1, len(halves)):
        for (name, (head, _)), (other, (_, tail)) in zip(halves, halves[step:], strict=False):
            alike = ("_" in name) == ("_" in other) and name[0].isupper() == other[0].isupper()
            if alike and (head + tail).lower() not in lowered:
                made[head + tail] = None
            if len(made) >= count:
                return list(made)
    return list(made)


def _halves(name: str) -> tuple[str, str] | None:
    """A name cut between two of its words, or None if it is a single word."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|_", name)
    snake = "_" in words
    places = [i for i in range(1, len(words)) if words[i] != "_" and (not snake or words[i - 1] == "_")]
    if "".join(words) != name or name.startswith("_") or not places:
        return None
    middle = places[len(places) // 2]
    return "".join(words[:middle]), "".join(words[middle:])


def _invented(names: Sequence[str], kinds: Sequence[str]) -> list[Fact]:
    if not kinds:
        return []
    return [
        Fact(kind=kinds[number % len(kinds)], entity=name, slots={"name": name}, answer=REFUSAL, document="")
        for number, name in enumerate(names)
    ]
