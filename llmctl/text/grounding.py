"""Answers from passages: the prompt that holds them, the sentence that answers, citations that resolve, and refusal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmctl.text.retrieval import Index, Passage, best_support
from llmctl.text.template import plain_content
from llmctl.text.tokenizer import Message, Tokenizer

REFUSAL = "I cannot answer that from these documents."
MARKS = re.compile(r"(?<![\w\])])(?:\[\d+\])+")
"""Citations, `[1]` or `[1][2]`; the indices in `argv[1]` and `table[0][1]` are none."""
NUMBER = re.compile(r"\[(\d+)\]")
UNFINISHED = re.compile(r"(?:\[\d+\])+\Z|(?:\[\d+\])*\[\d*\Z")
"""The end of a text to which a citation may still be added."""
SENTENCE = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
INSTRUCTION = "Answer from these passages and cite them by number, as in [1]."


@dataclass(frozen=True)
class Citation:
    """`[number]` in an answer, and the passage it stands for."""

    number: int
    passage: Passage

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the chunk with its place in the document, score and support."""
        chunk = self.passage.chunk
        place = {"id": chunk.id, "document": chunk.document, "start": chunk.start, "end": chunk.end}
        scores = {"score": round(self.passage.score, 4), "support": round(self.passage.support, 4)}
        return {"number": self.number, **place, "text": chunk.text, **scores}


@dataclass(frozen=True)
class Grounds:
    """What was found for a question: the passages that an answer may use, none if it should be refused."""

    question: str
    passages: list[Passage]
    support: float
    refused: bool


@dataclass(frozen=True)
class GroundedPrompt:
    """The ids of a conversation whose last question comes with passages, and the passages that fitted in."""

    ids: list[int]
    passages: list[Passage] = field(default_factory=list)


def find_grounds(index: Index, question: str, k: int, refuse_below: float) -> Grounds:
    """Search; refuse if nothing is found or the best passage supports less than `refuse_below` of the question."""
    passages = index.search(question, k)
    support = best_support(passages)
    refused = not passages or support < refuse_below
    # What supports the question most comes first, because a short context may hold no more than one.
    ranked = sorted(passages, key=lambda passage: -passage.support)
    return Grounds(question, [] if refused else ranked, support, refused)


def quote(index: Index, grounds: Grounds) -> str:
    """The sentence that supports the question most, from the first passage, with its citation; or the refusal."""
    if grounds.refused:
        return REFUSAL
    sentences = [text.strip() for text in SENTENCE.split(grounds.passages[0].chunk.text) if text.strip()]
    # A list such as [1] in the text itself would read as a citation.
    plain = [MARKS.sub(lambda marks: NUMBER.sub(r"(\1)", marks.group()), text) for text in sentences]
    return f"{index.nearest(grounds.question, plain)} [1]"


def grounded_prompt(
    messages: Sequence[Message], passages: Sequence[Passage], tokenizer: Tokenizer, room: int
) -> GroundedPrompt:
    """Put passages before the last message, as many from the front as fit into `room` tokens of prompt.

    Without room for a single one `passages` is empty, and the answer should be refused.
    """
    best = GroundedPrompt([])
    for count in range(1, len(passages) + 1):
        shown = list(passages[:count])
        last = {**messages[-1], "content": grounded_content(plain_content(messages[-1].get("content")), shown)}
        ids = tokenizer.encode_chat([*messages[:-1], last], add_generation_prompt=True).ids
        if len(ids) > room:
            break
        best = GroundedPrompt(ids, shown)
    return best


def grounded_content(question: str, passages: Sequence[Passage]) -> str:
    """The text of a question with numbered passages."""
    numbered = [f"[{number}] {passage.chunk.text.strip()}" for number, passage in enumerate(passages, start=1)]
    return "\n\n".join([*numbered, INSTRUCTION, question])


def marks(answer: str) -> list[int]:
    """The numbers of all citations in a text, in order, whether they stand for something or not."""
    return [int(number) for found in MARKS.findall(answer) for number in NUMBER.findall(found)]


def citations(answer: str, passages: Sequence[Passage]) -> list[Citation]:
    """The citations in `answer` that stand for one of `passages`, each once, in order of first appearance."""
    numbers = dict.fromkeys(marks(answer))
    return [Citation(number, passages[number - 1]) for number in numbers if 1 <= number <= len(passages)]


class CitationFilter:
    """Takes citations that stand for nothing out of a text that arrives in parts."""

    def __init__(self, passages: int) -> None:
        self._passages = passages
        self._held = ""
        self._before = ""

    def add(self, text: str) -> str:
        """What may be shown; the beginning of a citation is held back until its end has come."""
        self._held += text
        cut = UNFINISHED.search(self._held)
        return self._show(cut.start() if cut else len(self._held))

    def flush(self) -> str:
        """The rest."""
        return self._show(len(self._held))

    def _show(self, size: int) -> str:
        part, self._held = self._held[:size], self._held[size:]
        # The character before decides whether `[1]` is a citation or an index.
        shown = MARKS.sub(self._keep, self._before + part)[len(self._before) :]
        self._before = (self._before + part)[-1:]
        return shown

    def _keep(self, found: re.Match[str]) -> str:
        return NUMBER.sub(lambda mark: mark.group() if 1 <= int(mark[1]) <= self._passages else "", found.group())


def missing_citation(index: Index, answer: str, passages: Sequence[Passage]) -> str:
    """What to add to an answer without citation: one of the passage that supports its words most, if any does."""
    if citations(answer, passages) or not answer.strip():
        return ""
    supports = index.supports(answer, [passage.chunk.searched for passage in passages])
    best = max(range(len(supports)), key=supports.__getitem__, default=0)
    return f" [{best + 1}]" if supports and supports[best] > 0 else ""


def attribute(index: Index, answer: str, passages: Sequence[Passage]) -> str:
    """A whole answer with citations that resolve: those that stand for nothing removed, a missing one added."""
    filtered = CitationFilter(len(passages))
    cleaned = (filtered.add(answer) + filtered.flush()).rstrip()
    return cleaned + missing_citation(index, cleaned, passages)
