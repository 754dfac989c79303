"""Where an OpenAI-compatible server is, and how one talks to it: address, key, and what went wrong in one word."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from llmctl import InputError, UsageError

KEY = "OPENAI_API_KEY"
"""Holds the key unless another variable is named."""


class HttpFailure(Exception):
    """A request that got no whole answer. `kind` is fit for counting: "status 500", "timeout", "broken off", …

    `retry_after` is the number of seconds after which the server wants the request again, if it says so.
    """

    def __init__(self, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.retry_after = kind, message, retry_after


@dataclass(frozen=True)
class Endpoint:
    """The base of a server's API."""

    host: str
    port: int
    tls: bool = False
    base: str = "/v1"
    key: str = ""

    @property
    def url(self) -> str:
        """`http://127.0.0.1:8000/v1`."""
        return f"{'https' if self.tls else 'http'}://{self.address}{self.base}"

    @property
    def address(self) -> str:
        """Host and port, as in the header `Host`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """Those of every request."""
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"Host": self.address, "Content-Type": "application/json", "Accept": "*/*", **key}


def is_url(text: str | None) -> bool:
    """Whether `text` names a server and no model."""
    return text is not None and text.startswith(("http://", "https://"))


def parse_endpoint(text: str, key_env: str | None = None) -> Endpoint:
    """The endpoint at a URL; `/v1` is added to one without a path. The key comes from `key_env`, else OPENAI_API_KEY.

    UsageError for what is no such URL, and for a variable that is named and not set.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{text} is no URL: {error}", hint="for example http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise UsageError(f"`{text}` is no address of a server", hint="for example http://127.0.0.1:8000 or …/v1")
    if key_env is not None and not os.environ.get(key_env):
        raise UsageError(f"the environment variable {key_env} is not set", hint=f"export {key_env}=… first")
    key = os.environ.get(key_env or KEY, "").strip()
    if not key.isprintable() or not key.isascii():
        raise UsageError(f"the key in {key_env or KEY} holds characters that no header can carry")
    tls = parts.scheme == "https"
    return Endpoint(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/") or "/v1", key)


def error_text(raw: bytes) -> str:
    """What a server says went wrong: OpenAI's `error.message`, else the beginning of the body in one line."""
    try:
        body = json.loads(raw)
    except ValueError:
        return " ".join(raw[:300].decode(errors="replace").split()) or "no reason is given"
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:500]


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, by `retry-after-ms` (OpenAI's) or `retry-after`, which may be a date (RFC 9110, 10.2.3).

    Names are in lower case; None if neither is there or can be read.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            seconds = float(headers[name]) * unit
            if 0 <= seconds < math.inf:
                return seconds
    with suppress(KeyError, ValueError):
        due = parsedate_to_datetime(headers["retry-after"])
        return max(0.0, due.timestamp() - time.time())
    return None


def read_event(line: bytes) -> dict[str, Any] | None:
    """The JSON of a `data:` line; None for the end, `[DONE]`. HttpFailure for an error that is sent as an event."""
    data = line[5:].strip()
    if data == b"[DONE]":
        return None
    try:
        event = json.loads(data)
    except ValueError as error:
        raise HttpFailure("bad event", f"an event is no JSON: {data[:100].decode(errors='replace')}") from error
    if not isinstance(event, dict):
        raise HttpFailure("bad event", "an event is no JSON object")
    if event.get("error"):
        raise HttpFailure("error event", error_text(data))
    return event


def event_parts(event: dict[str, Any]) -> Iterator[tuple[int, str, str | None, Any]]:
    """(index, text, finish reason, logprobs) of every choice of a chunk, of a chat or of a completion."""
    choices = event.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise HttpFailure("bad event", "the choices of an event are no list of objects")
    for choice in choices:
        said = choice.get("delta") or choice
        if not isinstance(said, dict):
            raise HttpFailure("bad event", "the delta of an event is no object")
        text = said.get("content") or said.get("reasoning_content") or said.get("text") or ""
        if not isinstance(text, str):
            raise HttpFailure("bad event", "the text of an event is no text")
        yield choice.get("index", 0), whole_characters(text), choice.get("finish_reason"), choice.get("logprobs")


def read_usage(body: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(tokens of the prompt, of the answer) as a response or an event says them; None for what it does not say."""
    usage = body.get("usage")
    found = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, new = (value if isinstance(value, int) and value >= 0 else None for value in found)
    return prompt, new


def whole_characters(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can say and nothing can print."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pick_model(found: dict[str, Any], url: str) -> str:
    """The only model of a server's `/models`, adapters apart.

    UsageError if there are several, InputError if there is none.
    """
    listed = [one for one in found.get("data") or () if isinstance(one, dict)]
    names = [str(one.get("id")) for one in listed if one.get("parent") is None]
    if not names:
        raise InputError(f"{url} has no model", hint="name one with --model")
    if len(names) > 1:
        raise UsageError(f"{url} has {len(names)} models", hint=f"choose with --model: {', '.join(names[:8])}")
    return names[0]
