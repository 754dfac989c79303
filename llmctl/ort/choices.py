"""The next tokens of many answers, and their scores: what each answer remembers from token to token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.beams import Continuation
from llmctl.engine import Constraint, TokenScores
from llmctl.generator import Sampling
from llmctl.ort import sampling as single


@dataclass
class AnswerState:
    """One answer's sampler and constraint."""

    sampler: single.Sampler
    constraint: Constraint | None
    adjusts: bool = False

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        if self.constraint is not None:
            self.constraint.accept(token)

    def copy(self) -> AnswerState:
        """A second answer that begins like this one."""
        return AnswerState(self.sampler, self.constraint and self.constraint.copy(), self.adjusts)


def state(
    sampling: Sampling, prompt: Sequence[int], vocab_size: int | None, constraint: Constraint | None = None
) -> AnswerState:
    """The state of a new answer."""
    return AnswerState(single.Sampler(sampling), constraint and constraint.copy(), constraint is not None)


def choose(logits: np.ndarray, states: Sequence[AnswerState]) -> np.ndarray:
    """The next token of each answer, `(B,)` int64, from `logits (B, V)`; the states move on."""
    chosen = np.empty(len(states), np.int64)
    for row, one in enumerate(states):
        found = logits[row]
        if one.constraint is not None:
            found = np.where(one.constraint.mask(), found, -np.inf)
        chosen[row] = one.sampler(found)
        one.accept(int(chosen[row]))
    return chosen


def scores(logits: np.ndarray, tokens: Sequence[int], k: int) -> list[TokenScores]:
    """The log-probability of each token under `logits (B, V)`, with the `k` likeliest."""
    likely = single.log_probabilities(logits)
    found = []
    for row, token in zip(likely, tokens, strict=True):
        best = np.argsort(-row, kind="stable")[:k].tolist()
        found.append(TokenScores(int(token), float(row[token]), tuple((one, float(row[one])) for one in best)))
    return found


def rank(
    logits: np.ndarray, totals: Sequence[float], wanted: int, states: Sequence[AnswerState] = ()
) -> list[Continuation]:
    """The best continuations of beams."""
    return single.rank(logits, totals, wanted)
