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


@dataclass
class Answered:
    """One finished choice."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    scores: list[TokenScore] | None = None


@dataclass(frozen=True)
class Shape:
    """The parts that all bodies of one response share."""

    kind: Kind
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", NAMES[self.kind][0] + uuid.uuid4().hex)

    def _head(self, streamed: bool) -> dict[str, Any]:
        name = NAMES[self.kind][2 if streamed else 1]
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def whole(self, answers: Sequence[Answered], usage: dict[str, int], **more: Any) -> dict[str, Any]:
        """A complete response."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head(False), "choices": choices, "usage": usage, **more}

    def _choice(self, index: int, answer: Answered) -> dict[str, Any]:
        end = {"finish_reason": answer.finish_reason}
        if self.kind == "chat":
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            scores = None if answer.scores is None else {"content": [score.to_chat() for score in answer.scores]}
            return {"index": index, "message": message, "logprobs": scores, **end}
        scores = None if answer.scores is None else completion_scores(answer.scores)
        return {"index": index, "text": answer.text, "logprobs": scores, **end}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before the first text: a chat names the role."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.kind == "chat" else None

    def part(self, index: int, text: str, finish_reason: str | None) -> Iterator[dict[str, Any]]:
        """The chunks for a piece of text and, if it is the last one, for the end."""
        if self.kind == "completion":
            if text or finish_reason:
                choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
                yield {**self._head(True), "choices": [choice]}
            return
        if text:
            yield self._chunk(index, {"content": text}, None)
        if finish_reason:
            yield self._chunk(index, {}, finish_reason)

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head(True), "choices": [choice]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk with the counts, which has no choices."""
        return {**self._head(True), "choices": [], "usage": usage}


def completion_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """As in `logprobs` of a text completion."""
    offsets, at = [], 0
    for score in scores:
        offsets.append(at)
        at += len(score.text)
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [{other.text: other.logprob for other in score.top} for score in scores],
        "text_offset": offsets,
    }


def usage_counts(prompt: int, new: int) -> dict[str, int]:
    """Token counts of a response."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def grounds_fields(found: Sequence[Citation], refused: bool) -> dict[str, Any]:
    """The extension fields of an answer from documents."""
    return {"citations": [citation.to_dict() for citation in found], "refused": refused}


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
