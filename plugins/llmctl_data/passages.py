"""Questions about any corpus: which document says this, how does this sentence go on, how does a section begin."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import replace

from llmctl_data.facts import Fact, FactBook, Phrasings, rank
from llmctl_data.readers import Document, title_of

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9À-ÞΑ-Ω\u0400-\u042f])|\n\s*\n")
HEADING = re.compile(r"^#{1,6}\s+(?P<heading>\S.*?)\s*#*\s*$", re.MULTILINE)
MARKUP = re.compile(r"^\s*([#|>*+`~]|-\s|\d+[.)]\s)|`{3}|\|")
WORDS = range(7, 29)
ANSWER_WORDS = 8
ANSWER_CHARS = 80

PHRASINGS = {
    "source": Phrasings(
        train=(
            'Which document says: "{sentence}"?',
            'In which document does it say "{sentence}"?',
            'Where is it written: "{sentence}"? Name the document.',
            'Name the document that says: "{sentence}"',
            '"{sentence}" Which document is this from?',
            'Tell me the document with the sentence "{sentence}"',
            'What document holds the sentence "{sentence}"?',
            'I read "{sentence}" Which document was it?',
        ),
        heldout=(
            'Which document holds the sentence "{sentence}"?',
            'Name the document this is from: "{sentence}"',
        ),
    ),
    "continuation": Phrasings(
        train=(
            'How does this sentence continue: "{start}"',
            'Continue the sentence: "{start}"',
            'Complete this sentence: "{start}"',
            'What comes after "{start}"',
            '"{start}" How does it continue?',
            'How does the text go on after "{start}"',
            'Finish the sentence "{start}"',
            'Give the rest of the sentence: "{start}"',
        ),
        heldout=('Continue this: "{start}"', 'How does the sentence go on after "{start}"'),
    ),
    "section": Phrasings(
        train=(
            'What does the section "{heading}" of {title} begin with?',
            'How does the section "{heading}" of {title} begin?',
            'Give the first sentence of the section "{heading}" of {title}.',
            'What is the first sentence of "{heading}" in {title}?',
            'Quote the beginning of the section "{heading}" of {title}.',
            'How does "{heading}" in {title} start?',
            'Begin the section "{heading}" of {title}.',
            'What does {title} say first under "{heading}"?',
        ),
        heldout=(
            'How does the section "{heading}" of {title} start?',
            'What is the first sentence of the section "{heading}" of {title}?',
        ),
    ),
}


class PassageFacts:
    """Collects candidate facts from documents that pass by; keeps at most `keep` of each kind, whatever the size.

    Which ones is decided by a hash of what is asked, so a question met again, perhaps with another answer, always
    meets its first occurrence if that was kept: repeated questions are recognised as ambiguous without a list of all.
    """

    def __init__(self, seed: int, keep: int) -> None:
        self._seed, self._keep = seed, keep
        self._heaps: dict[str, list[int]] = {kind: [] for kind in PHRASINGS}
        self._kept: dict[str, dict[int, Fact | None]] = {kind: {} for kind in PHRASINGS}

    def add(self, document: Document, train: bool) -> None:
        """Look at one document, which is in the training split or not."""
        for fact in _facts(document):
            self._offer(replace(fact, trainable=train))

    def _offer(self, fact: Fact) -> None:
        key = rank(self._seed, fact.kind, sorted(fact.slots.items()))
        heap, kept = self._heaps[fact.kind], self._kept[fact.kind]
        if key in kept:
            known = kept[key]
            if known is not None and (known.answer, known.document) != (fact.answer, fact.document):
                kept[key] = None  # ambiguous; its place stays taken so that it is recognised again
            return
        if len(heap) >= self._keep:
            if key >= -heap[0]:
                return
            del kept[-heapq.heappop(heap)]
        heapq.heappush(heap, -key)
        kept[key] = fact

    def book(self) -> FactBook:
        """The facts that were kept; `source` only where there are several documents to choose from."""
        found = [fact for kind in PHRASINGS for _, fact in sorted(self._kept[kind].items()) if fact is not None]
        titles = {fact.answer for fact in found if fact.kind == "source"}
        return FactBook([fact for fact in found if fact.kind != "source" or len(titles) > 1], PHRASINGS)


def _facts(document: Document) -> Iterator[Fact]:
    title = title_of(document.source)
    near = (document.id, document.source)
    for sentence in _sentences(document.text):
        words = sentence.split()
        entity = f"{document.id}:{rank(sentence):016x}"
        if len(title) <= ANSWER_CHARS:
            yield Fact("source", entity, {"sentence": sentence}, title, document.id, near)
        cut = max(len(words) * 6 // 10, len(words) - ANSWER_WORDS)
        start, rest = " ".join(words[:cut]), " ".join(words[cut:])
        if len(rest) <= ANSWER_CHARS:
            yield Fact("continuation", entity, {"start": start}, rest, document.id, near)
    for match in HEADING.finditer(document.text):
        below = HEADING.split(document.text[match.end() :], maxsplit=1)[0]
        first = next(_sentences(below), None)
        if first is not None and len(first) <= 2 * ANSWER_CHARS:
            slots = {"heading": match["heading"], "title": title}
            yield Fact("section", f"{document.id}:{match['heading']}", slots, first, document.id, near)


def _sentences(text: str) -> Iterator[str]:
    """Sentences of running text, on one line each; headings, lists, tables, code and scraps are left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        if any(MARKUP.search(line) or line.startswith("    ") for line in paragraph.splitlines()):
            continue
        for part in SENTENCE.split(paragraph):
            sentence = " ".join(part.split())
            if sentence.endswith((".", "!", "?")) and len(sentence.split()) in WORDS and '"' not in sentence:
                yield sentence
