"""Analogies, "a is to b as c is to d": d by 3CosAdd (Mikolov 2013) or 3CosMul (Levy & Goldberg 2014), and how often
it is right on a file of questions.

Questions, answers and what is counted are those of gensim's `evaluate_word_analogies`, so that both give the same
accuracy: case is ignored, questions with an unknown word are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmctl import InputError
from llmctl.text.datasets import read_lines
from llmctl.text.vectors import BLOCK, Vectors, largest

TINY = 1e-6
"""What 3CosMul adds to the divisor, as in gensim."""
SYNTACTIC = "gram"
"""Google's sections of grammar begin with it; all others are of meaning."""
NEAREST = 5
"""Candidates that are looked at: among them may be the question's own words in another case."""


@dataclass
class Section:
    """Counts of one section of a file."""

    name: str
    right: int = 0
    asked: int = 0
    unknown: int = 0
    """Questions with a word that has no vector; they are not in `asked`."""

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 without any question."""
        return self.right / self.asked if self.asked else 0.0

    def add(self, other: Section) -> None:
        """Count another section in."""
        self.right += other.right
        self.asked += other.asked
        self.unknown += other.unknown


def read_questions(path: Path) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """(section, questions) of a file in Google's format. InputError names the line that is none."""
    found: list[tuple[str, list[tuple[str, str, str, str]]]] = []
    for number, line in read_lines(path):
        words = line.split()
        if not words:
            continue
        if line.startswith(":"):
            found.append((line[1:].strip(), []))
            continue
        if len(words) != 4:
            raise InputError(f"{path}:{number}: {len(words)} words", hint="four a line, or `: name` of a section")
        if not found:
            found.append(("questions", []))
        a, b, c, d = words
        found[-1][1].append((a, b, c, d))
    if not any(questions for _, questions in found):
        raise InputError(f"{path} holds no questions", hint="four words a line")
    return found


def answers(
    vectors: Vectors, questions: Sequence[tuple[int, int, int]], top: int, *, multiply: bool = False
) -> list[list[tuple[int, float]]]:
    """The `top` rows that are to c as b is to a, with their scores, for rows (a, b, c), which are no answers."""
    asked = np.array(questions, np.int64).reshape(-1, 3)
    unit = vectors.unit
    if not multiply:
        sums = unit[asked[:, 1]] - unit[asked[:, 0]] + unit[asked[:, 2]]
        return vectors.neighbours(sums, top, [list(row) for row in asked])
    found = []
    for begin in range(0, len(asked), BLOCK):
        part = asked[begin : begin + BLOCK]
        a, b, c = ((1 + unit[part[:, place]] @ unit.T) / 2 for place in range(3))
        scores = b * c / (a + TINY)
        for row, own in zip(scores, part, strict=True):
            row[own] = -np.inf
            places = largest(row, min(top, len(row) - len(set(own.tolist()))))
            found.append([(int(place), float(row[place])) for place in places])
    return found


def evaluate(
    vectors: Vectors,
    sections: Sequence[tuple[str, Sequence[tuple[str, str, str, str]]]],
    *,
    multiply: bool = False,
    most: int = 300_000,
) -> list[Section]:
    """Counts of each section. `most`: only so many names, the first, are known and are answers."""
    if most < len(vectors.names):
        vectors = Vectors(vectors.names[:most], vectors.matrix[:most], vectors.info)
    upper = [name.upper() for name in vectors.names]
    rows = {name: row for row, name in reversed(list(enumerate(upper)))}
    found = []
    for name, questions in sections:
        section = Section(name)
        known = [[rows.get(word.upper(), -1) for word in question] for question in questions]
        usable = [row for row in known if -1 not in row]
        section.unknown, section.asked = len(known) - len(usable), len(usable)
        said = answers(vectors, [(a, b, c) for a, b, c, _ in usable], NEAREST, multiply=multiply)
        for (a, b, c, d), candidates in zip(usable, said, strict=True):
            own = {upper[a], upper[b], upper[c]}
            first = next((upper[row] for row, _ in candidates if upper[row] not in own), None)
            section.right += first == upper[d]
        found.append(section)
    return found


def totals(sections: Sequence[Section]) -> list[Section]:
    """Meaning, grammar and all together."""
    semantic, syntactic, total = Section("semantic"), Section("syntactic"), Section("total")
    for section in sections:
        (syntactic if section.name.startswith(SYNTACTIC) else semantic).add(section)
        total.add(section)
    return [semantic, syntactic, total]
