"""Facts of a corpus, and the choice among them: deterministic, none too frequent, some entities held out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fact:
    """One thing a corpus says, as a question's slots and its answer.

    `document` is the id of the text row that holds the answer. `near` are the groups it belongs to, narrowest
    first (module, package): a wrong answer from the same group is the more plausible one. `wrong` are false
    answers made from the right one.
    """

    kind: str
    entity: str
    slots: Mapping[str, str]
    answer: str
    document: str
    near: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    trainable: bool = True
    """Whether its document lies in the training split; what validation text says is never trained on."""


@dataclass(frozen=True)
class Phrasings:
    """Questions of one kind, with `{slot}`s: those trained on and those kept for validation."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class FactBook:
    """What a corpus yields: candidate facts, how each kind is asked, and things that do not exist."""

    candidates: Sequence[Fact]
    phrasings: Mapping[str, Phrasings]
    invented: Callable[[int, Sequence[str]], list[Fact]] = field(default=lambda count, kinds: [])
    """`invented(n, kinds)`: up to n things that do not exist, asked about in these kinds by turns; the right answer to
    any such question is a refusal."""


@dataclass(frozen=True)
class Choice:
    """The facts in training, and those whose entity no training question names."""

    trained: list[Fact]
    heldout: list[Fact]


REFUSAL = "I don't know."


@dataclass(frozen=True)
class Invented:
    """Things that do not exist, dealt out so that no name serves two purposes."""

    asked: list[Fact]
    """For the split `unanswerable`: never trained on."""
    refused: list[Fact]
    """For refusals in the training conversations."""
    paired: list[Fact]
    """For refusals against made-up answers in the preferences."""


def deal_invented(book: FactBook, choice: Choice, asked: int, refused: int, paired: int) -> Invented:
    """The first names are asked, the next refused, the rest paired; a corpus that knows none gives empty lists.

    They are asked about in the kinds of the trained facts, whose answers are what could be made up.
    """
    names = book.invented(asked + refused + paired, sorted({fact.kind for fact in choice.trained}))
    return Invented(names[:asked], names[asked : asked + refused], names[asked + refused :])


def unit(*parts: Any) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    return rank(*parts) / 2.0**64


def rank(*parts: Any) -> int:
    """A 64-bit number that depends on nothing but `parts`: the key of every random order here."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def choose(candidates: Sequence[Fact], params: Any, seed: int) -> Choice:
    """Held-out entities first, then facts by kind and share, `max_answer_share` respected."""
    entities = sorted({fact.entity for fact in candidates}, key=lambda entity: rank(seed, "entity", entity))
    # A small corpus keeps most of its entities for training.
    count = min(params.heldout_entities, len(entities) // 4)
    aside = set(entities[:count])
    ordered = sorted(candidates, key=lambda fact: rank(seed, "fact", fact.kind, fact.entity, fact.answer))
    free = [fact for fact in ordered if fact.trainable and fact.entity not in aside]
    trained = _by_share(free, params.mix, params.facts, params.max_answer_share)
    groups = [[fact for fact in ordered if fact.entity == entity] for entity in entities[:count]]
    heldout = [_one_of(group, params.mix, seed) for group in groups]
    return Choice(trained, [fact for fact in heldout if fact is not None])


def _one_of(facts: Sequence[Fact], mix: Mapping[Any, float], seed: int) -> Fact | None:
    """One fact of an entity, its kind by the shares of `mix` (the first arrival of exponential clocks)."""
    clocks = [
        (-math.log(1 - unit(seed, "clock", fact.kind, fact.entity)) / mix[fact.kind], fact)
        for fact in facts
        if mix.get(fact.kind, 0) > 0
    ]
    return min(clocks, key=lambda item: item[0])[1] if clocks else None


def _by_share(facts: Sequence[Fact], mix: Mapping[Any, float], count: int, max_share: float) -> list[Fact]:
    """`count` of `facts` in the shares of `mix`; where a kind runs out the others fill up."""
    kinds = sorted({fact.kind for fact in facts if mix.get(fact.kind, 0) > 0})
    whole = sum(mix[kind] for kind in kinds)
    most = max(1, int(count * max_share))
    given: Counter[str] = Counter()
    chosen: list[Fact] = []

    def take(pool: Iterable[Fact], room: int) -> list[Fact]:
        rest = []
        for fact in pool:
            if room > 0 and given[fact.answer] < most:
                given[fact.answer] += 1
                chosen.append(fact)
                room -= 1
            else:
                rest.append(fact)
        return rest

    left: list[Fact] = []
    for kind in kinds:
        left += take([fact for fact in facts if fact.kind == kind], round(count * mix[kind] / whole))
    take(left, count - len(chosen))
    return chosen[:count]
