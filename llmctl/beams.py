"""Beam search without a model: which beams go on and which answers are finished, for every engine alike.

The rules are those of transformers' `generate(num_beams=…)`, so answers agree token for token. An engine runs the
model, ranks the continuations of all beams together and hands over the best; it gets back which rows of its cache go
on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmctl.errors import UsageError
from llmctl.generator import Candidate, Sampling

Top = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities by the model itself, best first."""


class Continuation(NamedTuple):
    """A token that may follow a beam."""

    beam: int
    token: int
    logprob: float
    """The model's own."""
    score: float
    """What the search adds up: `logprob`, changed by bias, penalties and constraints."""
    top: Top = ()
    """The likeliest tokens in its place, if they are to be kept."""


@dataclass(frozen=True)
class Beam:
    """An unfinished answer."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    """Sum of the scores: of `logprobs` where nothing changes them."""
    tops: tuple[Top, ...] = ()

    def extend(self, by: Continuation) -> Beam:
        """The beam with one more token."""
        tops = (*self.tops, by.top) if by.top else ()
        return Beam((*self.ids, by.token), (*self.logprobs, by.logprob), self.total + by.score, tops)


class BeamSearch:
    """The beams of one prompt. `limit` is the most tokens of an answer.

    An engine calls `step` with the `wanted` best continuations until it is given no rows to go on with; after each step
    it feeds these rows with `tokens`. The answers are then in `finished`.
    """

    def __init__(self, sampling: Sampling, eos_ids: frozenset[int], limit: int) -> None:
        self.sampling, self.eos_ids, self.limit = sampling, eos_ids, limit
        self.width = sampling.beams
        self.beams = [Beam()]
        self._finished: list[tuple[float, Candidate]] = []

    @property
    def finished(self) -> list[Candidate]:
        """The best answers so far, best first, at most `width`."""
        return [answer for _, answer in self._finished]

    @property
    def wanted(self) -> int:
        """Continuations to rank at each step: enough that `width` remain when every beam offers each EOS id."""
        return max(2, 1 + len(self.eos_ids)) * self.width

    @property
    def totals(self) -> list[float]:
        """Score of each beam, to be added to those of its continuations."""
        return [beam.total for beam in self.beams]

    @property
    def tokens(self) -> list[int]:
        """The last token of each beam, to be fed next."""
        return [beam.ids[-1] for beam in self.beams]

    def step(self, best: Sequence[Continuation]) -> list[int]:
        """Take the best continuations, best first; for each new beam the old one that it continues, none at the end.

        A beam that nothing continues is given up. UsageError if that is so of all, and no answer is finished.
        """
        if not (best or self._finished):
            raise UsageError(
                "no beam can go on: the constraint allows no token, or the logits are not numbers",
                hint="relax the schema, regex or grammar",
            )
        full = len(self.beams[0].ids) + 1 == self.limit
        going: list[tuple[int, Beam]] = []
        for rank, one in enumerate(best):
            ended = one.token in self.eos_ids
            longer = self.beams[one.beam].extend(one)
            if not (ended or full):
                going.append((one.beam, longer))
            elif self._accepts(rank):
                self._finish(longer, ended)
        self._finished.sort(key=lambda one: one[0], reverse=True)
        del self._finished[self.width :]
        going = going[: self.width]
        if not going or self._over(going[0][1]):
            return []
        self.beams = [beam for _, beam in going]
        return [parent for parent, _ in going]

    def _accepts(self, rank: int) -> bool:
        """Only the best `width` may end: those below are there to go on in the place of ended ones."""
        return rank < self.width

    def _finish(self, beam: Beam, ended: bool) -> None:
        ids, end = (beam.ids[:-1], beam.ids[-1]) if ended else (beam.ids, None)
        penalty = self.sampling.length_penalty
        answer = Candidate(list(ids), list(beam.logprobs), ended, penalty, end, list(beam.tops))
        self._finished.append((self._worth(answer, beam.total), answer))

    def _worth(self, answer: Candidate, total: float) -> float:
        return self._score(total, len(answer.logprobs))

    def _score(self, total: float, length: int) -> float:
        return total / math.pow(length, self.sampling.length_penalty)

    def _over(self, best: Beam) -> bool:
        """Whether no unfinished beam is to be followed any further; `best` is the likeliest."""
        if len(self._finished) < self.width:
            return False
        if self.sampling.early_stopping is True:
            return True
        length = len(best.ids)
        if self.sampling.early_stopping == "never" and self.sampling.length_penalty > 0:
            length = self.limit  # log-probabilities are negative: the longest answer has the best score
        return self._score(best.total, length) <= self._finished[-1][0]
