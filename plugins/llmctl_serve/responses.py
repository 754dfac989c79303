"""Bodies of responses, whole and in parts, in OpenAI's shapes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl.text.grounding import Citation
from llmctl_serve.logprobs import TokenScore

Kind = Literal["chat", "completion"]
NAMES = {
    "chat": ("chatcmpl-", "chat.completion", "chat.completion.chunk"),
    "completion": ("cmpl-", "text_completion", "text_completion"),
}


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability (None for the first of a prompt), and where in the choice's text it begins."""

    score: TokenScore
    offset: int
    known: bool = True


@dataclass
class Part:
    """What is new in one choice: text for the reader, calls of tools, scores, and at its end why it ended."""

    index: int
    text: str = ""
    calls: Sequence[dict[str, Any]] = ()
    """As in a chunk's `delta.tool_calls`."""
    scores: Sequence[Scored] = ()
    finish_reason: str | None = None


@dataclass
class Answered:
    """One choice so far."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    scores: list[Scored] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Complete calls, as in a message's `tool_calls`."""
    total: float = 0.0
    """Log-probability of the generated tokens, where they are scored."""

    def add(self, part: Part) -> None:
        """Note a part."""
        self.text += part.text
        self.finish_reason = part.finish_reason or self.finish_reason
        if self.scores is not None:
            self.scores += part.scores
        for call in part.calls:
            merge_call(self.calls, call)


def merge_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """Add a chunk of a call to the calls so far, as clients do."""
    if delta["index"] == len(calls):
        calls.append({"id": delta["id"], "type": "function", "function": {**delta["function"]}})
    else:
        calls[delta["index"]]["function"]["arguments"] += delta["function"].get("arguments", "")


@dataclass(frozen=True)
class Shape:
    """The parts that all bodies of one response share."""

    kind: Kind
    model: str
    fingerprint: str = ""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", NAMES[self.kind][0] + uuid.uuid4().hex)

    def _head(self, streamed: bool) -> dict[str, Any]:
        name = NAMES[self.kind][2 if streamed else 1]
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def whole(self, answers: Sequence[Answered], usage: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A complete response."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head(False), "choices": choices, "usage": usage, **more}

    def _choice(self, index: int, answer: Answered) -> dict[str, Any]:
        end = {"logprobs": self._scores(answer.scores), "finish_reason": answer.finish_reason}
        if self.kind == "completion":
            return {"index": index, "text": answer.text, **end}
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message |= {"content": answer.text or None, "tool_calls": answer.calls}
        return {"index": index, "message": message, **end}

    def _scores(self, scores: Sequence[Scored] | None) -> dict[str, Any] | None:
        if scores is None:
            return None
        if self.kind == "chat":
            return {"content": [one.score.to_chat() for one in scores], "refusal": None}
        return completion_scores(scores)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before the first text: a chat names the role."""
        return self._chunk(index, {"role": "assistant", "content": ""}) if self.kind == "chat" else None

    def part(self, part: Part, scored: bool) -> Iterator[dict[str, Any]]:
        """The chunks for a part and, if it is the last one, for the end."""
        scores = self._scores(part.scores) if scored else None
        if self.kind == "completion":
            if part.text or part.scores or part.finish_reason:
                choice = {"index": part.index, "text": part.text, "logprobs": scores}
                yield {**self._head(True), "choices": [{**choice, "finish_reason": part.finish_reason}]}
            return
        if part.text or part.scores:
            yield self._chunk(part.index, {"content": part.text}, scores)
        for call in part.calls:
            yield self._chunk(part.index, {"tool_calls": [call]})
        if part.finish_reason:
            yield self._chunk(part.index, {}, None, part.finish_reason)

    def _chunk(
        self, index: int, delta: dict[str, Any], scores: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish_reason}
        return {**self._head(True), "choices": [choice]}

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the counts, which has no choices."""
        return {**self._head(True), "choices": [], "usage": usage}


def completion_scores(scores: Sequence[Scored]) -> dict[str, Any]:
    """As in `logprobs` of a text completion."""
    return {
        "tokens": [one.score.text for one in scores],
        "token_logprobs": [one.score.logprob if one.known else None for one in scores],
        "top_logprobs": [_alternatives(one.score) if one.known else None for one in scores],
        "text_offset": [one.offset for one in scores],
    }


def _alternatives(score: TokenScore) -> dict[str, float]:
    """The likeliest tokens, and the chosen one too, by their texts; of two with one text the likelier one stays."""
    found = {other.text: other.logprob for other in reversed(score.top)}
    return {**found, score.text: max(score.logprob, found.get(score.text, score.logprob))}


def usage_counts(prompt: int, new: int, cached: int) -> dict[str, Any]:
    """Token counts of a response."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def grounds_fields(found: Sequence[Citation], refused: bool) -> dict[str, Any]:
    """The extension fields of an answer from documents."""
    return {"citations": [citation.to_dict() for citation in found], "refused": refused}


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
