"""A model behind a URL, for the terminal: the same conversation as with one that is opened here."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl import InputError, StageError, UsageError
from llmctl.generator import Sampling
from llmctl.spec.files import is_there
from llmctl_serve.endpoint import (
    Endpoint,
    HttpFailure,
    error_text,
    event_parts,
    is_url,
    parse_endpoint,
    pick_model,
    read_event,
    read_usage,
)
from llmctl_serve.spent import Spent

TIMEOUT = 600.0
FIELDS = {"max_new_tokens": "max_tokens"}
"""Names that OpenAI's API has for ours; the others are the same."""
UNKNOWN = ("beams", "length_penalty", "early_stopping")


def request_fields(given: dict[str, Any], stop: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a request's body for what is set. UsageError for what no server of this API knows."""
    values = {name: value for name, value in given.items() if value is not None}
    for name in UNKNOWN:
        if name in values:
            raise UsageError(f"a server's API has no {name}", hint="open the model here for beam search")
    Sampling(**{name: value for name, value in values.items() if name != "n"})  # refuses values out of range
    if "logit_bias" in values:
        values["logit_bias"] = {str(token): value for token, value in values["logit_bias"]}
    fields = {FIELDS.get(name, name): value for name, value in values.items()}
    return {**fields, "stop": list(stop)} if stop else fields


def score_fields(logprobs: int | None, chat: bool) -> dict[str, Any]:
    """The fields that ask for log-probabilities with so many alternatives; none for None."""
    if logprobs is None:
        return {}
    return {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}


@dataclass
class RemoteSession:
    """A conversation with a model of a server."""

    endpoint: Endpoint
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `Sampling`, by name; what is not set is the server's to choose."""
    stop: Sequence[str] = ()
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    spent: Spent | None = None
    form: dict[str, Any] = field(default_factory=dict)
    """What answers must look like, as fields of a request."""

    @property
    def backend(self) -> str:
        """For a human."""
        return f"{self.model} at {self.endpoint.url}"

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def set(self, name: str, value: Any) -> None:
        """Change how answers are chosen. UsageError for a value out of range."""
        settings = {**self.settings, name: value}
        request_fields(settings)
        self.settings = settings

    def values(self) -> dict[str, Any]:
        """What is set."""
        return dict(self.settings)

    def switch(self, name: str) -> None:
        """Talk to another model of the server. UsageError if it has none of that name."""
        names = [str(one.get("id")) for one in list_models(self.endpoint).get("data") or ()]
        if name not in names:
            hint = f"it has {', '.join(names)}"
            if is_url(name) or is_there(Path(name)):
                hint = f"take the conversation there: /save FILE, then `llmctl chat {name}` and /load FILE"
            raise UsageError(f"{self.endpoint.url} has no model `{name}`", hint=hint)
        self.model = name

    def tokens(self) -> str:
        """How long the conversation is, as far as the server has said."""
        if self.spent is None:
            return "not known before the first answer"
        return f"{self.spent.prompt + self.spent.new} tokens at the last answer"

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer and remember it, a part too if it is interrupted."""
        asked = [*self.turns, {"role": "user", "content": question}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        answer = ""
        try:
            for text in self._stream("/chat/completions", {"messages": [*system, *asked]}):
                answer += text
                yield text
        finally:
            if answer:
                self.turns = [*asked, {"role": "assistant", "content": answer}]

    def continue_text(self, text: str) -> Iterator[str]:
        """Stream the continuation of a text."""
        return self._stream("/completions", {"prompt": text})

    def _stream(self, path: str, asked: dict[str, Any]) -> Iterator[str]:
        body = {
            "model": self.model,
            **asked,
            **request_fields(self.settings, self.stop),
            **self.form,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        spent = Spent()
        try:
            for event in stream_events(self.endpoint, path, body):
                for index, text, reason, _ in event_parts(event):
                    spent.cut = spent.cut or (index == 0 and reason == "length")
                    if text and index == 0:
                        spent.note()
                        yield text
                prompt, new = read_usage(event)
                spent.prompt = spent.prompt if prompt is None else prompt
                spent.new = spent.new if new is None else new
        except HttpFailure as failure:
            raise StageError(f"{self.endpoint.url}: {failure.message} ({failure.kind})") from failure
        finally:
            spent.end()
            self.spent = spent


def open_remote(
    url: str,
    model: str | None,
    key_env: str | None,
    stop: Sequence[str],
    given: dict[str, Any],
    system: str = "",
    adapter: str | None = None,
) -> RemoteSession:
    """The session with a server's model, or an adapter of it; the only one it has, unless `model` names it."""
    endpoint = parse_endpoint(url, key_env)
    settings = {name: value for name, value in given.items() if value is not None}
    request_fields(settings, stop)
    name = model or pick_model(list_models(endpoint), endpoint.url)
    return RemoteSession(endpoint, name if adapter is None else f"{name}:{adapter}", settings, stop, system)


def list_models(endpoint: Endpoint) -> dict[str, Any]:
    """The body of `/models`. InputError if the server does not say."""
    try:
        with _Response(endpoint, "GET", "/models", None, 30) as response:
            raw = response.read()
        found = json.loads(raw)
    except HttpFailure as failure:
        raise InputError(f"{endpoint.url}/models: {failure.message} ({failure.kind})", hint="is it up?") from failure
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(f"{endpoint.url}/models cannot be read: {error}", hint="name a model with --model") from error
    return found if isinstance(found, dict) else {}


def stream_events(endpoint: Endpoint, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events that answer a body. HttpFailure for every failure; an interrupt closes the connection."""
    try:
        with _Response(endpoint, "POST", path, body, TIMEOUT) as response:
            for line in response:
                if line.startswith(b"data:"):
                    event = read_event(line)
                    if event is None:
                        return
                    yield event
    except TimeoutError as error:
        raise HttpFailure("timeout", f"nothing came for {TIMEOUT:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise HttpFailure("broken off", f"the connection broke: {' '.join(str(error).split())}") from error
    raise HttpFailure("broken off", "the stream ended without [DONE]")


class _Response:
    """A response within a `with` block. HttpFailure unless its status is 200."""

    def __init__(self, endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> None:
        if endpoint.tls:
            context = ssl.create_default_context()
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                endpoint.host, endpoint.port, timeout=timeout, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=timeout)
        raw = None if body is None else json.dumps(body).encode()
        self._asked = method, endpoint.base + path, raw, endpoint.headers

    def __enter__(self) -> http.client.HTTPResponse:
        try:
            self._connection.request(*self._asked)
            response = self._connection.getresponse()
        except OSError as error:
            self._connection.close()
            raise HttpFailure("no connection", f"the server does not answer: {error}") from error
        if response.status != 200:
            text = error_text(response.read())
            self._connection.close()
            raise HttpFailure(f"status {response.status}", text)
        return response

    def __exit__(self, *_: object) -> None:
        self._connection.close()
