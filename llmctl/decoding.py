"""The loops of generation over rows of tokens in flight, for every engine alike: many draws at once, and beams.

An engine brings its `Rows`, what draws a token from logits, and what ranks continuations; no framework is needed here,
because logits are only handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmctl.beams import BeamSearch, Continuation
from llmctl.generator import Candidate

Logits = Any
"""An engine's own array: `(B, V)` for rows, `(V,)` for one of them."""
Rank = Callable[[Logits, Sequence[float], int], Sequence[Continuation]]
"""(logits of all beams, what to add to the log-probabilities of each, how many) -> the best continuations."""


class Rows(Protocol):
    """Sequences in flight, with their caches."""

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to every row; the logits after it, `(B, V)`."""

    def hold(self, rows: Sequence[int]) -> None:
        """These rows do not grow in the next step; what it gives for them means nothing."""

    def keep(self, rows: Sequence[int]) -> Rows:
        """New rows that go on from these ones, in this order; a row may be named several times."""


@dataclass
class Answer:
    """One answer while it is drawn."""

    sample: Callable[[Logits], int]
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    def candidate(self, length_penalty: float) -> Candidate:
        """The answer with its scores; `draw` must have been given `score`."""
        return Candidate(self.ids, self.logprobs, self.ended, length_penalty)


def draw(
    rows: Rows,
    logits: Logits,
    answers: Sequence[Answer],
    eos_ids: frozenset[int],
    score: Callable[[Logits, int], float] | None = None,
) -> None:
    """Fill the answers, one for each row, until all have ended; `logits` are those after the prompts.

    `score` gives the log-probability of a token; without it none are noted.
    """
    at = list(range(len(answers)))  # the answer that each row belongs to
    alive = set(at)
    while True:
        for row, index in enumerate(at):
            if index in alive:
                answer = answers[index]
                token = answer.sample(logits[row])
                if score is not None:
                    answer.logprobs.append(score(logits[row], token))
                answer.ended = token in eos_ids
                if not answer.ended:
                    answer.ids.append(token)
                if answer.ended or len(answer.ids) == answer.limit:
                    alive.remove(index)
        if not alive:
            return
        going = [row for row, index in enumerate(at) if index in alive]
        # Rows that are done stay where they are until half of them can be dropped in one copy.
        if len(going) <= len(at) // 2:
            rows, at = rows.keep(going), [at[row] for row in going]
        else:
            rows.hold([row for row, index in enumerate(at) if index not in alive])
        logits = rows.step([answers[index].ids[-1] if answers[index].ids else 0 for index in at])


def search_beams(rows: Rows, logits: Logits, search: BeamSearch, rank: Rank) -> list[Candidate]:
    """Run a beam search from one row, whose prompt has given `logits (1, V)`; the finished answers, best first."""
    width = 1
    while parents := search.step(rank(logits, search.totals, search.wanted)):
        if parents != list(range(width)):
            rows = rows.keep(parents)
        width = len(parents)
        logits = rows.step(search.tokens)
    return search.finished
