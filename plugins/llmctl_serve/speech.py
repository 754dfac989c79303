"""One answer while it comes: tokens become text that may be shown, and scores of the tokens in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llmctl.engine import Event, FinishReason, TokenScores
from llmctl.text.streaming import Detokenizer, StopStrings
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    index: int = 0
    """Which choice of the response."""
    text: str = ""
    tokens: int = 0
    """How many were generated, those of a stop string included."""
    scores: Sequence[tuple[TokenScores, int]] = ()
    """Of the tokens whose text has been shown, each with the place in the answer's text where it begins."""
    finish_reason: FinishReason | None = None
    prompt_scores: Sequence[TokenScores | None] | None = None
    cached: int = 0
    end: TokenScores | None = None
    """Of the EOS id that ended the answer, where the engine scored it."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.text or self.tokens or self.scores or self.cached or self.finish_reason) and (
            self.prompt_scores is None
        )

    def to(self, index: int) -> Piece:
        """The same for this choice of the response."""
        return replace(self, index=index)


@dataclass
class Speech:
    """Follows one answer. A stop string or a stop token ends it, and is not shown."""

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    scored: bool = False
    over: bool = False
    _known: int = 0
    """Characters of all tokens so far."""
    _shown: int = 0
    _pending: list[tuple[TokenScores, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._words, self._stops = Detokenizer(self.tokenizer), StopStrings(self.stop)

    def take(self, event: Event) -> Piece:
        """What an event adds."""
        text, count, stopped = "", 0, False
        reason = event.finish_reason
        for at, token in enumerate(event.tokens):
            count += 1
            if token in self.stop_ids:
                reason = "stop"
                break
            if self.scored:
                self._pending.append((event.scores[at], self._known))
            shown, stopped = self._add(self._words.add(token))
            text += shown
            if stopped:
                reason = "stop"
                break
        if reason is not None and not stopped:
            shown, stopped = self._add(self._words.flush())
            text += shown + ("" if stopped else self._stops.flush())
            reason = "stop" if stopped else reason
        self.over = reason is not None
        self._shown += len(text)
        scores = self._visible(everything=self.over and not stopped)
        ended = reason == event.finish_reason == "stop" and not stopped
        end = event.scores[len(event.tokens)] if ended and len(event.scores) > len(event.tokens) else None
        return Piece(0, text, count, scores, reason, event.prompt_scores, event.cached, end)

    def silent(self, event: Event) -> Piece:
        """The scores of the prompt, and nothing of an answer."""
        self.over = event.prompt_scores is not None or event.finish_reason is not None
        reason: FinishReason | None = "length" if self.over else None
        return Piece(0, "", 0, (), reason, event.prompt_scores, event.cached)

    def _add(self, text: str) -> tuple[str, bool]:
        self._known += len(text)
        return self._stops.add(text)

    def _visible(self, everything: bool) -> Sequence[tuple[TokenScores, int]]:
        """Scores of tokens that begin in what is shown, each given out once."""
        ready = len(self._pending) if everything else sum(start < self._shown for _, start in self._pending)
        out, self._pending = self._pending[:ready], self._pending[ready:]
        return out
