"""What an answer remembers from token to token: its random numbers, what it said, and what it may say next."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from llmctl.engine import Constraint
from llmctl.errors import UsageError
from llmctl.generator import Sampling, check_bias
from llmctl.rules import RuleState


class Tally:
    """How often each token occurred, as arrays that change logits in one go."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        found, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
        self._size = len(found)
        self._at = {token: place for place, token in enumerate(found.tolist())}
        self._ids = np.concatenate([found, np.zeros(64, np.int64)])
        self._counts = np.concatenate([counts, np.zeros(64)]).astype(np.float32)

    @property
    def ids(self) -> np.ndarray:
        """The distinct tokens, int64."""
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `ids` occurred, float32."""
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        """The token occurred once more."""
        place = self._at.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place], self._size = token, place + 1
        self._counts[place] += 1

    def copy(self) -> Tally:
        """Another one with the same counts."""
        other = Tally()
        other._size, other._at = self._size, dict(self._at)
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other


class AnswerState:
    """One answer while it is chosen. Made by `state`."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        constraint: Constraint | None,
        rules: RuleState | None = None,
    ) -> None:
        self.sampling = sampling
        self.random = np.random.default_rng(sampling.seed)
        self.constraint = constraint
        self.bias_ids = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self.bias = np.array([value for _, value in sampling.logit_bias], np.float32)
        self.seen = Tally(prompt) if sampling.repetition_penalty != 1 else None
        """Tokens of prompt and answer."""
        self.said = Tally() if sampling.frequency_penalty or sampling.presence_penalty else None
        """Tokens of the answer."""
        self.rules = rules
        self.never = np.array(rules.always if rules else (), np.int64)
        """What the rules ban at every position."""
        self.adjusts = bool(sampling.logit_bias or self.seen or self.said or constraint or rules)
        """Whether logits are changed before a token is chosen, and tokens must be told to `accept`."""
        self.plain = not self.adjusts and sampling.temperature == 0
        """Whether the next token is the argmax of the logits, and that is all."""

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        if self.seen is not None:
            self.seen.add(token)
        if self.said is not None:
            self.said.add(token)
        forced = None
        if self.rules is not None:
            forced = self.rules.forced()
            self.rules.accept(token)
        # What is forced need not be of the form that was asked for, a language's token for instance.
        if self.constraint is not None and (forced is None or self.constraint.mask()[token]):
            self.constraint.accept(token)

    def copy(self) -> AnswerState:
        """A second answer that begins like this one; its random numbers are the same too."""
        other = copy.copy(self)
        other.random = copy.deepcopy(self.random)
        other.seen = self.seen and self.seen.copy()
        other.said = self.said and self.said.copy()
        other.constraint = self.constraint and self.constraint.copy()
        other.rules = self.rules and self.rules.copy()
        return other


def state(
    sampling: Sampling,
    prompt: Sequence[int],
    vocab_size: int | None,
    constraint: Constraint | None = None,
    eos_ids: frozenset[int] = frozenset(),
    limit: int | None = None,
) -> AnswerState:
    """The state of a new answer to `prompt`; for an encoder-decoder that is what the decoder begins with.

    `constraint` is copied. The sampling's rules need `eos_ids` and the `limit` of the answer, `max_new_tokens` unless
    it is given. Raises UsageError if the logit bias names an id that is not below `vocab_size`.
    """
    check_bias(sampling, vocab_size)
    rules = None
    if sampling.rules is not None:
        rules = RuleState(sampling.rules, prompt, eos_ids, limit or sampling.max_new_tokens, vocab_size)
    return AnswerState(sampling, prompt, constraint and constraint.copy(), rules)


def adjust(logits: np.ndarray, rows: Sequence[int], states: Sequence[AnswerState], *, dead_ends: bool = False) -> None:
    """Write bias, penalties, constraints, rules into `logits (B, V)` float32: of `states[i]` into row `rows[i]`.

    Raises UsageError where a constraint allows nothing; with `dead_ends` such a row becomes -inf.
    """
    biased = [(row, one.bias_ids, one.bias) for row, one in zip(rows, states, strict=True) if len(one.bias)]
    if biased:
        at = _places([(row, ids) for row, ids, _ in biased])
        np.add.at(logits, at, np.concatenate([values for _, _, values in biased]))
    seen = [(row, one.seen.ids, one.sampling) for row, one in zip(rows, states, strict=True) if one.seen is not None]
    if seen:
        at = _places([(row, ids) for row, ids, _ in seen])
        penalty = np.repeat([s.repetition_penalty for _, _, s in seen], [len(ids) for _, ids, _ in seen])
        values, penalty = logits[at], penalty.astype(np.float32)
        logits[at] = np.where(values < 0, values * penalty, values / penalty)
    said = [(row, one.said, one.sampling) for row, one in zip(rows, states, strict=True) if one.said is not None]
    if said:
        at = _places([(row, tally.ids) for row, tally, _ in said])
        logits[at] -= np.concatenate(
            [tally.counts * np.float32(s.frequency_penalty) + np.float32(s.presence_penalty) for _, tally, s in said]
        )
    for row, one in zip(rows, states, strict=True):
        if one.constraint is not None or one.rules is not None:
            _restrict(logits[row], one, dead_ends=dead_ends)


def _restrict(logits: np.ndarray, one: AnswerState, *, dead_ends: bool) -> None:
    """Leave in `logits (V,)` what the constraint and the rules allow, as transformers orders them.

    Where the rules ban all that the constraint allows they do not count: the form is what was asked for.
    """
    rules = one.rules
    forced = None if rules is None else rules.forced()
    if forced is not None:
        logits[:] = -np.inf
        logits[list(forced)] = 0
        return
    if one.constraint is not None:
        allowed = one.constraint.mask()
        if not (dead_ends or allowed.any()):
            raise UsageError("the constraint allows no token here", hint="relax the schema, regex or grammar")
        np.copyto(logits, -np.inf, where=~allowed)
    if rules is None:
        return
    banned = np.concatenate([one.never, np.array(rules.banned(), np.int64)])
    kept = logits[banned]
    logits[banned] = -np.inf
    if one.constraint is not None and np.isneginf(logits.max()):
        logits[banned] = kept


def _places(found: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of all ids of all rows, to index logits with."""
    return np.repeat([row for row, _ in found], [len(ids) for _, ids in found]), np.concatenate([i for _, i in found])
