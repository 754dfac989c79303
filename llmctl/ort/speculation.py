"""Speculative decoding: tokens are proposed, and one call of the model tells how many of them it would have said.

The idea is that of Leviathan et al. (2211.17192) and Chen et al. (2302.01318). Their rejection sampling keeps the
distribution, but spends random numbers otherwise than plain decoding does. Here the model's token is chosen as always,
position by position, from the logits of the one call, and the next position counts only if the proposal said the same.
Proposals are points, not distributions, so just as many are accepted as by rejection (each with the probability that
the model gives it), and a request's tokens are those it would have got without speculation, under its seed too.

`com.microsoft.GroupQueryAttention` takes several tokens on top of a past for one row only, so proposals are judged row
by row. Whether that is quicker than a step of all rows together depends on the model, the machine and the text:
`Speculation.drafts` measures and decides at every step.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmctl.engine import EngineOptions, TokenScores
from llmctl.errors import UsageError
from llmctl.generator import Generator
from llmctl.ort.drafts import Drafter, DraftModel, PromptLookup
from llmctl.ort.history import AnswerState
from llmctl.ort.sampling import choose, scores
from llmctl.ort.slots import Slots
from llmctl.ort.tasks import Lane

_log = logging.getLogger(__name__)

REMEMBERED = 9
"""Calls of one kind and size whose median says what such a call takes."""
FIRST_PAUSE, LONGEST_PAUSE = 8, 512
"""Steps of all rows together, although there were proposals, after which they are tried once more; doubled each time
that it did not pay."""

LONGEST_RUN = 64
"""Steps in a row that speculate, after which one is plain, so that its cost is that of now."""


class Costs:
    """Seconds that calls take, by kind and size."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[int, deque[float]]] = {}

    def add(self, kind: str, size: int, seconds: float) -> None:
        """A call took so long."""
        self._seen.setdefault(kind, {}).setdefault(size, deque(maxlen=REMEMBERED)).append(seconds)

    def known(self, kind: str, size: int) -> bool:
        """Whether there was such a call."""
        return size in self._seen.get(kind, {})

    def of(self, kind: str, size: int) -> float:
        """The median; of the nearest size if there was no such call, 0 if there was none of its kind: what is unknown
        is tried."""
        sizes = self._seen.get(kind)
        if not sizes:
            return 0.0
        nearest = size if size in sizes else min(sizes, key=lambda one: abs(one - size))
        return statistics.median(sizes[nearest])


@dataclass
class Acceptance:
    """How probable it is that a proposed token is right, given that those before it were. Older ones count less."""

    right: float = 1.0
    judged: float = 1.5

    def add(self, proposed: int, accepted: int) -> None:
        """Of `proposed` tokens the first `accepted` were right; those behind the first wrong one were not judged."""
        self.right = 0.9 * self.right + accepted
        self.judged = 0.9 * self.judged + accepted + (accepted < proposed)

    @property
    def rate(self) -> float:
        """Between 0 and 1."""
        return self.right / self.judged

    def expected(self, proposed: int) -> float:
        """How many of `proposed` tokens will be right."""
        return sum(self.rate**i for i in range(1, proposed + 1))


@dataclass
class Progress:
    """What speculation knows about a lane."""

    acceptance: Acceptance
    length: int
    """Tokens to propose next: two more after a proposal that was right throughout, one less after another."""


class Speculation:
    """Proposes tokens for the running lanes of an engine and judges them."""

    def __init__(
        self,
        slots: Slots,
        drafter: Drafter,
        most: int,
        eos_ids: frozenset[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.slots, self.drafter, self.most, self.eos_ids, self.clock = slots, drafter, most, eos_ids, clock
        self.costs = Costs()
        self.overall = Acceptance()
        """Of all lanes: what a new one begins with."""
        self.drafted = self.accepted = 0
        self._progress: dict[Lane, Progress] = {}
        self._plain = 0
        """Steps in a row that had proposals and did not pay."""
        self._run = 0
        """Steps in a row that speculated."""
        self._pause = FIRST_PAUSE
        self.failed: Exception | None = None
        """Why nothing is proposed any more, if the draft has failed."""

    # -- whether -------------------------------------------------------------------------------------------------------

    def drafts(self, lanes: Sequence[Lane]) -> list[list[int]] | None:
        """What is proposed for each lane; None if a step of all rows together is the better one.

        It is where a beam search runs, as its rows advance together; where nothing is proposed; and where `pays` says
        so. A lane for which proposing does not pay goes on with one token beside the others.
        """
        if self.failed is not None or any(lane.task.search is not None for lane in lanes):
            return None
        try:
            return self._drafts(lanes)
        except Exception as error:  # of the draft's session: the answers do not need it
            self.failed = error
            self.drafter.close()
            _log.warning("speculation has ended, answers go on without it: %s: %s", type(error).__name__, error)
            return None

    def _drafts(self, lanes: Sequence[Lane]) -> list[list[int]] | None:
        """As `drafts`, where no search runs."""
        if not self.costs.known("step", len(lanes)):
            return None  # without it nothing can be compared
        if self._run >= LONGEST_RUN:
            self._run = 0
            return None
        self.drafter.begin()
        plan = [self.drafter.plan(lane, self._most(lane)) for lane in lanes]
        if not any(plan):
            return None
        trying = self._plain >= self._pause
        if not trying:
            plan = [count if self._gains(lane, count) else 0 for lane, count in zip(lanes, plan, strict=True)]
            if not (any(plan) and self.pays(lanes, plan)):
                self._plain += 1
                self._run = 0
                return None
        found = [self._propose(lane, count) if count else [] for lane, count in zip(lanes, plan, strict=True)]
        if not any(found):
            return None
        self._plain = 0
        self._run += 1
        paying = not trying or self.pays(lanes, plan)
        self._pause = FIRST_PAUSE if paying else min(2 * self._pause, LONGEST_PAUSE)
        return found

    def pays(self, lanes: Sequence[Lane], plan: Sequence[int]) -> bool:
        """Whether proposals of these lengths give more tokens per second than a step of all rows together."""
        tokens = sum(self._tokens(lane, count) for lane, count in zip(lanes, plan, strict=True))
        seconds = sum(self._seconds(count) for count in plan)
        return tokens * self.costs.of("step", len(lanes)) > len(lanes) * seconds

    def _gains(self, lane: Lane, count: int) -> bool:
        """Whether the proposal gives this lane more tokens per second than one token alone, also judged alone."""
        return count > 0 and self._tokens(lane, count) * self._seconds(0) >= self._seconds(count)

    def _tokens(self, lane: Lane, count: int) -> float:
        return 1 + self._of(lane).acceptance.expected(count)

    def _seconds(self, count: int) -> float:
        """To propose `count` tokens for a lane and to judge them."""
        feed = "feed" if self.costs.known("feed", 1) or count else "step"  # one row alone is a step of one
        return self.costs.of(feed, count + 1) + (self.costs.of("propose", count) if count else 0.0)

    def _most(self, lane: Lane) -> int:
        """Tokens that may be proposed: one more is said after them, and the answer ends at its limit."""
        return min(self._of(lane).length, lane.task.limit - lane.said - 1)

    def _of(self, lane: Lane) -> Progress:
        found = self._progress.get(lane)
        if found is None:
            found = self._progress[lane] = Progress(replace(self.overall), self.most)
        return found

    # -- what ----------------------------------------------------------------------------------------------------------

    def _propose(self, lane: Lane, count: int) -> list[int]:
        started = self.clock()
        found = self.drafter.propose(lane, count)
        if len(found) == count:  # else a prompt was read, or the answer is believed to end
            self.costs.add("propose", count, self.clock() - started)
        return found

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """`Slots.step`, timed."""
        started = self.clock()
        logits = self.slots.step(tokens)
        self.costs.add("step", len(tokens), self.clock() - started)
        return logits

    def judge(self, lane: Lane, draft: Sequence[int]) -> tuple[list[int], tuple[TokenScores, ...]]:
        """Feed the lane's token and `draft`; the tokens that the answer goes on with, at least one, and their scores.

        The slot then holds the fed token and what was accepted; the last token of the result is fed by the next step.
        """
        start = int(self.slots.lengths[lane.slot])
        started = self.clock()
        logits = self.slots.feed(lane.slot, np.array([lane.token, *draft], np.int32))
        self.costs.add("feed", 1 + len(draft), self.clock() - started)
        tokens = follow(logits, draft, lane.state, self.eos_ids)
        self.slots.lengths[lane.slot] = start + len(tokens)
        self._learn(lane, len(draft), len(tokens) - 1)
        count = lane.task.request.logprobs
        return tokens, () if count is None else tuple(scores(logits[: len(tokens)], tokens, count))

    def _learn(self, lane: Lane, proposed: int, accepted: int) -> None:
        if not proposed:
            return
        self.drafter.judged(lane, accepted)
        self.drafted += proposed
        self.accepted += accepted
        progress = self._of(lane)
        for one in (progress.acceptance, self.overall):
            one.add(proposed, accepted)
        longer = progress.length + 2 if accepted == proposed else progress.length - 1
        progress.length = min(max(1, longer), self.most)

    def forget(self, lane: Lane) -> None:
        """The lane has ended."""
        self._progress.pop(lane, None)
        self.drafter.forget(lane)

    def close(self) -> None:
        """Give the memory back."""
        self._progress.clear()
        self.drafter.close()


def follow(logits: np.ndarray, draft: Sequence[int], state: AnswerState, eos_ids: frozenset[int]) -> list[int]:
    """What the answer goes on with, from `logits (len(draft) + 1, V)` of the fed token and of `draft`.

    Each token is chosen as without a draft, with the answer's own random numbers, penalties and constraint, which
    move on by the tokens that are chosen and no others. The first that differs from the draft is the last one: the
    logits behind it follow another text.
    """
    tokens: list[int] = []
    for place in range(len(draft) + 1):
        token = int(choose(logits[place : place + 1], [state])[0])
        tokens.append(token)
        if token in eos_ids or place == len(draft) or token != draft[place]:
            break
    return tokens


def open_speculation(
    slots: Slots, options: EngineOptions, vocab_size: int, eos_ids: frozenset[int]
) -> Speculation | None:
    """What `options` ask for, over an engine's slots; None without speculation. UsageError if it cannot be."""
    draft: Generator | None = options.draft
    if options.speculation != "draft" and draft is not None:
        raise UsageError(
            f"a draft model is given, but speculation is {options.speculation!r}", hint='set speculation to "draft"'
        )
    if options.speculation == "none":
        return None
    drafter: Drafter
    if options.speculation == "prompt-lookup":
        drafter = PromptLookup(eos_ids)
    else:
        drafter = DraftModel(draft, vocab_size, options.slots, slots.capacity, options.prefill_tokens)
    return Speculation(slots, drafter, options.draft_tokens, eos_ids)
