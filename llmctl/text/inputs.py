"""Labelled rows as a model reads them, and its numbers back in their terms: words, characters. Free of any framework.

Training and evaluation both go through here, so that they cannot frame a text in two ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl.text.tokenizer import Framed, Tokenizer

Row = Mapping[str, Any]


def frame_text(tokenizer: Tokenizer, row: Row) -> Framed:
    """The text of a classification row, with its pair where it has one."""
    return tokenizer.frame(row["text"], row.get("pair"))


@dataclass(frozen=True)
class Words:
    """The words of a row, and the places of each one's tokens, none for a word that has none of its own."""

    framed: Framed
    tokens: list[list[int]]

    @property
    def places(self) -> list[int | None]:
        """The place of each word's first token."""
        return [tokens[0] if tokens else None for tokens in self.tokens]


def frame_words(tokenizer: Tokenizer, words: Sequence[str]) -> Words:
    """Words with single spaces between them; a token belongs to the word in which it begins."""
    framed = tokenizer.frame(" ".join(words))
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    tokens: list[list[int]] = [[] for _ in words]
    for place, (part, (start, end)) in enumerate(zip(framed.parts, framed.spans, strict=True)):
        if part is not None and start != end:
            tokens[int(np.searchsorted(starts, start, side="right")) - 1].append(place)
    return Words(framed, tokens)


@dataclass(frozen=True)
class Asked:
    """A question with its context, and which of its tokens may be part of an answer, `(L,)`."""

    framed: Framed
    candidates: np.ndarray


def frame_question(tokenizer: Tokenizer, question: str, context: str) -> Asked:
    """The question first, then the context, whose tokens are the candidates."""
    framed = tokenizer.frame(question, context)
    return Asked(framed, np.array([part == 1 for part in framed.parts]))


def answer_places(asked: Asked, start: int, end: int) -> tuple[int, int] | None:
    """The first and last token of the context's characters `start` to `end`; None if no token covers them."""
    covered = [
        place
        for place, (part, (first, last)) in enumerate(zip(asked.framed.parts, asked.framed.spans, strict=True))
        if part == 1 and first < end and last > start
    ]
    return (covered[0], covered[-1]) if covered else None


def best_answer(asked: Asked, starts: np.ndarray, ends: np.ndarray, longest: int) -> tuple[int, int]:
    """The characters of the context between the likeliest start and end, at most `longest` tokens apart.

    `starts`, `ends`: logits `(L,)`. The sum of both decides.
    """
    places = np.flatnonzero(asked.candidates)
    count = len(places)
    scores = starts[places][:, None] + ends[places][None, :]
    distance = np.arange(count)[None, :] - np.arange(count)[:, None]
    scores = np.where((distance >= 0) & (distance < longest), scores, -np.inf)
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    return asked.framed.spans[places[first]][0], asked.framed.spans[places[last]][1]
