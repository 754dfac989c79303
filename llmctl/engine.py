"""What it means to answer many requests side by side, free of any framework: a server knows only this.

An `Engine` deals in token ids, as a `llmctl.generator.Generator` does, but its answers advance together: requests join
and leave between two steps. Stop strings, text and HTTP are the caller's: it cancels a choice whose text has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from llmctl.errors import LlmctlError, UsageError
from llmctl.generator import Sampling

if TYPE_CHECKING:
    import numpy as np

    from llmctl.generator import Generator

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop` after an EOS id, `length` at `max_new_tokens` or the end of the context."""


class QueueFullError(LlmctlError):
    """No further request is taken at present."""


class Constraint(Protocol):
    """What one answer must look like, followed token by token. It has a state, so every answer has its own."""

    def mask(self) -> np.ndarray:
        """Which tokens may come next, `(V,)` bool; EOS ids are among them where the answer may end here."""

    def accept(self, token: int) -> None:
        """The answer goes on with this token, which the mask allowed."""

    def copy(self) -> Constraint:
        """A second one in the same state."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how its `sampling.n` answers are chosen."""

    prompt: Sequence[int]
    sampling: Sampling
    constraint: Constraint | None = None
    """In its first state; copied for every answer."""
    logprobs: int | None = None
    """Score each token, with that many of the likeliest alternatives; None: nothing is scored."""
    prompt_logprobs: int | None = None
    """Likewise for the tokens of the prompt."""
    client: str = ""
    """Who asks: waiting requests of different clients are admitted in turn."""
    adapter: str | None = None
    """The adapter that answers; None: the model as it is."""

    def __post_init__(self) -> None:
        """UsageError for a negative number of alternatives."""
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None and value < 0:
                raise UsageError(f"{name} must not be negative, got {value}", hint="0 scores the tokens alone")


@dataclass(frozen=True)
class TokenScores:
    """Natural log-probabilities under the model itself: temperature 1, nothing filtered, biased or penalised."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and theirs, best first."""


@dataclass(frozen=True)
class Event:
    """What one step did for one answer."""

    ticket: int
    choice: int = 0
    """Which of the `sampling.n` answers."""
    tokens: tuple[int, ...] = ()
    """New ids, without the EOS id; more than one where drafted tokens were accepted."""
    scores: tuple[TokenScores, ...] = ()
    """Those of `tokens`, if asked for, and after them that of the EOS id if the answer ended with one."""
    prompt_scores: tuple[TokenScores | None, ...] | None = None
    """Of the whole prompt, on the first event of choice 0 if asked for; its first token has none."""
    cached: int = 0
    """On the first event of an answer: tokens of the prompt whose keys were there already."""
    finish_reason: FinishReason | None = None
    """On the last event of this choice."""
    admitted: float | None = None
    """When the request left the queue, in seconds of `time.perf_counter`; on an event that says nothing else and comes
    once, before all others of the request."""
    error: BaseException | None = None
    """The request has failed; there are no further events of it."""


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was opened, and its state now."""

    waiting: int = 0
    running: int = 0
    """Answers that advance with every step."""
    slots: int = 0
    """Most answers side by side."""
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of prompts that the prefix cache saved."""
    cache_used: int = 0
    """Tokens whose keys and values are held, those of past answers included."""
    cache_capacity: int = 0
    evictions: int = 0
    drafted: int = 0
    """Tokens that speculation proposed, and how many of them the model confirmed."""
    accepted: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How much an engine does at once."""

    slots: int = 16
    """Most answers side by side."""
    max_queue: int = 64
    """Requests that may wait; a further one raises QueueFullError."""
    context: int = 0
    """Most tokens of one sequence, prompt and answer; 0: the model's context."""
    prefill_tokens: int = 256
    """Most tokens of prompts that are read between two steps of the running answers."""
    prefix_cache: bool = True
    """Keep keys and values of past sequences, for prompts that begin alike."""
    speculation: Literal["none", "prompt-lookup", "draft"] = "none"
    draft: Generator | None = None
    """The small model that proposes tokens, for `speculation="draft"`."""
    draft_tokens: int = 4
    """Most tokens proposed at a time."""


class Engine(Protocol):
    """One opened model answering many requests. All calls come from one thread, or one at a time."""

    context_length: int
    vocab_size: int
    eos_ids: frozenset[int]
    backend: str

    def submit(self, request: Request) -> int:
        """Queue a request; its ticket.

        Raises UsageError for a prompt that cannot be answered or an adapter that the model does not have,
        QueueFullError if too many wait.
        """

    def at_once(self, request: Request) -> bool:
        """Whether the tokens of its answer come all together, at the end."""

    def cancel(self, ticket: int, choice: int | None = None) -> None:
        """Nobody wants this answer, or any of the request's answers, any more; no further event comes of it."""

    def step(self) -> list[Event]:
        """Advance: admit what fits, read prompts under the budget, one token for every running answer."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""

    def stats(self) -> EngineStats:
        """Counts and state."""

    def close(self) -> None:
        """Give the memory back; what is unfinished is cancelled."""
