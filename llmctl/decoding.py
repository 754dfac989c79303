"""The loops of generation over rows of tokens in flight, for every engine alike: many draws at once, and beams.

An engine brings its `Rows`, what draws a token from logits, and what ranks continuations; no framework is needed here,
because logits are only handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmctl.beams import BeamSearch, Continuation
from llmctl.generator import Candidate

Logits = Any
"""An engine's own array: `(B, V)` for rows, `(V,)` for one of them."""
Rank = Callable[[Logits, Sequence[float], int, Sequence[Any]], Sequence[Continuation]]
"""(logits of all beams, what to add to the scores of each, how many, states) -> the best continuations."""
Choose = Callable[[Logits, Sequence[Any]], Iterable[int]]
"""(logits of some rows, the states of their answers) -> the next token of each; the states move on."""


class State(Protocol):
    """An engine's memory of one answer: what it said, and what it may say next."""

    @property
    def adjusts(self) -> bool:
        """Whether it changes logits, so that it must be told of every token."""

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""

    def copy(self) -> State:
        """A second answer that begins like this one."""


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

    state: State
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: int | None = None
    """The EOS id it ended with."""

    @property
    def ended(self) -> bool:
        """Ended with an EOS id."""
        return self.end is not None

    def candidate(self, length_penalty: float) -> Candidate:
        """The answer with its scores; `draw` must have been given `score`."""
        return Candidate(self.ids, self.logprobs, self.ended, length_penalty, self.end)


def draw(
    rows: Rows,
    logits: Logits,
    answers: Sequence[Answer],
    eos_ids: frozenset[int],
    choose: Choose,
    score: Callable[[Logits, int], float] | None = None,
) -> None:
    """Fill the answers, one for each row, until all have ended; `logits` are those after the prompts.

    `score` gives the log-probability of a token; without it none are noted.
    """
    at = list(range(len(answers)))  # the answer that each row belongs to
    alive = set(at)
    while True:
        going = [row for row, index in enumerate(at) if index in alive]
        chosen = choose(logits if len(going) == len(at) else logits[going], [answers[at[row]].state for row in going])
        for row, token in zip(going, map(int, chosen), strict=True):
            answer = answers[at[row]]
            if score is not None:
                answer.logprobs.append(score(logits[row], token))
            if token in eos_ids:
                answer.end = token
            else:
                answer.ids.append(token)
            if answer.ended or len(answer.ids) == answer.limit:
                alive.remove(at[row])
        if not alive:
            return
        going = [row for row, index in enumerate(at) if index in alive]
        # Rows that are done stay where they are until half of them can be dropped in one copy.
        if len(going) <= len(at) // 2:
            rows, at = rows.keep(going), [at[row] for row in going]
        else:
            rows.hold([row for row, index in enumerate(at) if index not in alive])
        logits = rows.step([answers[index].ids[-1] if answers[index].ids else 0 for index in at])


def search_beams(
    rows: Rows, logits: Logits, search: BeamSearch, rank: Rank, state: State | None = None
) -> list[Candidate]:
    """Run a beam search from one row, whose prompt has given `logits (1, V)`; the finished answers, best first.

    `state` is that of the empty answer, where bias, penalties or a constraint may change what beams are ranked by.
    """
    width, states = 1, [state] if state is not None and state.adjusts else []
    while parents := search.step(rank(logits, search.totals, search.wanted, states)):
        if states:
            states = [states[parent].copy() for parent in parents]
            for one, token in zip(states, search.tokens, strict=True):
                one.accept(token)
        if parents != list(range(width)):
            rows = rows.keep(parents)
        width = len(parents)
        logits = rows.step(search.tokens)
    return search.finished
