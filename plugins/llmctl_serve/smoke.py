"""Smoke questions: asked over HTTP with nothing but the standard library, as any client would."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl import StageError

TIMEOUT = 300


@dataclass(frozen=True)
class Asked:
    """A question and what came back. `seconds` is the whole request's time."""

    question: str
    answer: str
    finish_reason: str
    tokens: int
    seconds: float
    streamed: bool
    citations: Sequence[Mapping[str, Any]] = ()
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Answered: some text, and an end that the model or the limit made."""
        return not self.problem and bool(self.answer.strip()) and self.finish_reason in ("stop", "length")


class Client:
    """A client of one server."""

    def __init__(self, host: str, port: int, model: str, api_key: str = "", chat: bool = True) -> None:
        self._address, self._model, self._chat = (host, port), model, chat
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> bytes:
        """The body of a page; StageError unless its status is 200."""
        status, body = self._request("GET", path)
        if status != 200:
            raise StageError(f"{path} answered {status}: {body[:200].decode(errors='replace')}")
        return body

    def ask(self, question: str, stream: bool = False) -> Asked:
        """Ask greedily; an HTTP error becomes the `problem` of the answer."""
        started = time.perf_counter()
        body: dict[str, Any] = {"model": self._model, "temperature": 0, "stream": stream}
        if self._chat:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": question}]
        else:
            path, body["prompt"] = "/v1/completions", question
        if stream:
            body["stream_options"] = {"include_usage": True}
        status, raw = self._request("POST", path, json.dumps(body).encode())
        seconds = time.perf_counter() - started
        if status != 200:
            problem = f"status {status}: {raw[:200].decode(errors='replace')}"
            return Asked(question, "", "", 0, seconds, stream, problem=problem)
        text, reason, tokens, cited = _read_stream(raw) if stream else _read_whole(json.loads(raw))
        return Asked(question, text, reason, tokens, seconds, stream, cited)

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self._address, timeout=TIMEOUT)
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise StageError(f"the server does not answer {method} {path}: {error}") from error
        finally:
            connection.close()


def _read_whole(body: Mapping[str, Any]) -> tuple[str, str, int, Sequence[Mapping[str, Any]]]:
    choice = body["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, choice["finish_reason"], body["usage"]["completion_tokens"], body.get("citations", [])


def _read_stream(raw: bytes) -> tuple[str, str, int, Sequence[Mapping[str, Any]]]:
    text, reason, tokens = "", "", 0
    cited: Sequence[Mapping[str, Any]] = []
    events = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line]
    if not events or events[-1] != "[DONE]":
        raise StageError("a streamed answer did not end with [DONE]")
    for chunk in map(json.loads, events[:-1]):
        if "error" in chunk:
            raise StageError(f"a streamed answer broke off: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            reason = choice["finish_reason"] or reason
        cited = chunk.get("citations", cited)
        tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
    return text, reason, tokens, cited
