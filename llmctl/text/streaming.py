"""Token ids to text while they arrive: no half characters, stop strings honoured across tokens."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmctl.generator import Candidate, Generator, Sampling
from llmctl.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmctl.engine import Constraint

FinishReason = Literal["stop", "length"]
UNFINISHED = "\ufffd"
PENDING = 8
"""Ids that wait for the end of a character before the first of them are given out."""
TAIL = 4
"""Ids, of at least one byte each, within which a character that is not complete begins."""


@dataclass(frozen=True)
class Delta:
    """What came since the last one: `text` to show, the ids consumed, and on the last one why it ended."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `token_ids` are all that were generated, those of a stop string included."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


class Detokenizer:
    """Turns ids into text one by one; the parts joined are `tokenizer.decode` of all ids.

    (With byte fallback, as in SentencePiece, where those ids are valid UTF-8: there a bad byte would change what came
    before it, which is already shown.) A part is held back while it ends within a UTF-8 character. Only the ids since
    the last cut are decoded again, with one part of context before them, because a decoder may treat the first
    token differently. A character has at most four bytes, so of many ids without a clean cut only the last few wait:
    each id costs the same however long the answer is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._open = False
        """Whether the context was cut within what may be a character, so that its last U+FFFD is not shown yet."""

    def add(self, token: int) -> str:
        """The text that this id completes, perhaps none."""
        if token in self._tokenizer.special_ids:
            return ""  # nothing of it is shown, and as a context it would be none
        self._pending.append(token)
        return self._cut(hold=True)

    def flush(self) -> str:
        """The rest, an unfinished character as U+FFFD."""
        return self._cut(hold=False)

    def _cut(self, hold: bool) -> str:
        whole = self._tokenizer.decode(self._context + self._pending)
        if hold and whole.endswith(UNFINISHED):
            if self._tokenizer.byte_tokens:
                if _within_a_character(self._pending, self._tokenizer.byte_tokens):
                    return ""
            else:
                return self._cut_early(whole) if len(self._pending) > PENDING else ""
        text = whole[len(self._shown(self._context)) :]
        if text:
            # Tokens without text stay pending, so that there is always a visible context.
            self._context, self._pending, self._open = self._pending, [], False
        elif len(self._pending) > PENDING:
            self._pending = []  # ids that the tokenizer does not know
        return text

    def _shown(self, ids: list[int]) -> str:
        """The text of the context as far as it is given out."""
        text = self._tokenizer.decode(ids)
        return text.removesuffix(UNFINISHED) if self._open else text

    def _cut_early(self, whole: str) -> str:
        """Give out what is certain of many ids that end in U+FFFD, be it meant, or bytes that are no character."""
        before = self._shown(self._context)
        for size in range(len(self._pending) - TAIL, 0, -1):
            head = self._tokenizer.decode(self._context + self._pending[:size])
            certain = head.removesuffix(UNFINISHED)
            if not whole.startswith(certain):
                continue
            self._context = (self._context + self._pending[:size])[-TAIL:]
            self._pending, self._open = self._pending[size:], head.endswith(UNFINISHED)
            return certain[len(before) :]
        return ""


def _within_a_character(ids: Sequence[int], values: Mapping[int, int]) -> bool:
    """Whether the bytes at the end of `ids` (byte fallback) begin a character that further ones may complete."""
    last = list(itertools.takewhile(lambda token: token in values, reversed(ids)))
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(bytes(values[token] for token in reversed(last)))
    except UnicodeDecodeError:
        return False
    return bool(decoder.getstate()[0])


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop string was met)."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0


def stream_text(
    generator: Generator,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    stop: Sequence[str] = (),
    constraint: Constraint | None = None,
) -> Iterator[Delta]:
    """Generate after `prompt_ids` and yield text as it becomes final; the last delta has a `finish_reason`.

    `stop` after an EOS id or a stop string (neither is shown), `length` at `max_new_tokens` or the end of the context.
    The texts joined are `tokenizer.decode` of all ids, cut before the first stop string.
    """
    limit = min(sampling.max_new_tokens, generator.room(prompt_ids))
    limit -= sampling.cuts(limit - 1, limit)  # the last token is a forced end
    # A generator of a plugin may be older than constraints.
    if constraint is None:
        return _texts(generator.stream(prompt_ids, sampling), tokenizer, limit, stop)
    return _texts(generator.stream(prompt_ids, sampling, constraint), tokenizer, limit, stop)


def _texts(tokens: Iterator[int], tokenizer: Tokenizer, limit: int, stop: Sequence[str]) -> Iterator[Delta]:
    """The text of ids while they arrive; `limit` of them are all that could come."""
    words, stops = Detokenizer(tokenizer), StopStrings(stop)
    count, fresh = 0, list[int]()
    try:
        for token in tokens:
            count += 1
            fresh.append(token)
            text, stopped = stops.add(words.add(token))
            if stopped:
                yield Delta(text, fresh, "stop")
                return
            if text:
                yield Delta(text, fresh)
                fresh = []
    finally:
        close = getattr(tokens, "close", None)
        if close is not None:
            close()  # a stop string ends the generation too
    text, stopped = stops.add(words.flush())
    if not stopped:
        text += stops.flush()
    yield Delta(text, fresh, "length" if count >= limit and not stopped else "stop")


def complete(
    generator: Generator,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> Completion:
    """The whole answer of `stream_text`."""
    return _joined(stream_text(generator, tokenizer, prompt_ids, sampling, stop))


def completion_of(tokenizer: Tokenizer, candidate: Candidate, stop: Sequence[str] = ()) -> Completion:
    """The text of an answer that is there already, cut as `stream_text` cuts it before the first stop string."""
    limit = len(candidate.ids) + candidate.ended
    return _joined(_texts(iter(candidate.ids), tokenizer, limit, stop))


def _joined(deltas: Iterator[Delta]) -> Completion:
    parts = list(deltas)
    reason = parts[-1].finish_reason
    assert reason is not None  # the last delta has one
    return Completion("".join(part.text for part in parts), [i for part in parts for i in part.token_ids], reason)
