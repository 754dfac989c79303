"""What is known about one request while it is answered: limits, metrics, logs and traces all read it from here.

The outermost middleware makes an `Exchange`; a route finds it with `exchange_of(request)` and says what happens:

    exchange.asked(model=…, artifact=…, prompt_tokens=…, max_tokens=…)   # well-formed; may raise ApiError 429
    exchange.admitted(cached=…)         # an engine has begun with it
    exchange.emitted(tokens, choice)    # as often as there are new tokens; from any thread
    exchange.finished("stop", choice)   # the end of one choice
    exchange.failed("code")             # a stream whose status was 200 has broken off

Nothing else is needed: whatever ends the request, the middleware settles reservations, counts, logs and traces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from llmctl.text.masking import MaskingTime

SCOPE = "llmctl.exchange"
"""Where the exchange lies in the ASGI scope."""


@dataclass
class Exchange:
    """One request and its answer. Times are `time.perf_counter` seconds; None means it has not happened."""

    request_id: str
    method: str
    path: str
    client: str = ""
    began: float = field(default_factory=time.perf_counter)
    wall: float = field(default_factory=time.time)
    """Unix time of the arrival."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Extra headers of the answer, set on the way: rate limits, trace."""
    traceparent: str = ""
    route: str = "other"
    key_id: str = ""
    model: str = ""
    artifact: str = ""
    """Content id of the model that answers: the way back to data, filters and seeds."""
    stream: bool = False
    operation: str = ""
    """`chat`, `text_completion`, `embeddings`, … as OpenTelemetry names them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sampling as asked for: max_tokens, temperature, top_p, seed, …"""
    prompt_tokens: int = 0
    max_tokens: int = 0
    """Most tokens that all answers together may have."""
    at_once: bool = False
    """Whether nothing of some answer is known before its end."""
    generated: int = 0
    cached: int = 0
    status: int = 0
    error: str = ""
    cut: str = ""
    """Why the answer was given up, if it was: client_left, slow_client, timeout, shutdown."""
    asked_at: float | None = None
    admitted_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    ended_at: float | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """Seconds between two deliveries of one answer, and the tokens that came with the second."""
    masking: MaskingTime | None = None
    """What following the form of the answers took, where they have one."""
    prompts: list[Any] = field(default_factory=list)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Prompts and answers, filled only where `records` says so."""
    records: bool = False
    on_asked: Callable[[Exchange], None] | None = None
    _last: dict[int, float] = field(default_factory=dict)

    def asked(
        self,
        *,
        model: str,
        artifact: str = "",
        prompt_tokens: int = 0,
        max_tokens: int = 0,
        at_once: bool = False,
        operation: str = "",
        stream: bool = False,
        settings: Mapping[str, Any] | None = None,
        prompts: Sequence[Any] = (),
    ) -> None:
        """The request is well-formed: what it wants. Reserves its tokens; ApiError 429 if a limit forbids them.

        `prompts` are token ids and text, kept only for the request log.
        """
        self.model, self.artifact, self.operation, self.stream = model, artifact, operation, stream
        self.prompt_tokens, self.max_tokens, self.at_once = prompt_tokens, max_tokens, at_once
        self.settings = dict(settings or {})
        if self.records:
            self.prompts = list(prompts)
        if self.on_asked is not None:
            self.on_asked(self)
        self.asked_at = time.perf_counter()

    def admitted(self, cached: int = 0, at: float | None = None) -> None:
        """It left the queue, now or `at` that time; `cached` tokens of the prompt need not be read again.

        Later calls only add tokens.
        """
        self.cached += cached
        if self.admitted_at is None:
            self.admitted_at = time.perf_counter() if at is None else at

    def emitted(self, tokens: int, choice: int = 0) -> None:
        """New tokens of one answer."""
        if not tokens:
            return
        now = time.perf_counter()
        if self.admitted_at is None:
            self.admitted_at = now
        if self.first_at is None:
            self.first_at = now
        before = self._last.get(choice)
        if before is not None:
            self.gaps.append((now - before, tokens))
        elif tokens > 1:
            self.gaps.append((0.0, tokens - 1))
        self._last[choice] = self.last_at = now
        self.generated += tokens

    def finished(self, reason: str, choice: int = 0) -> None:
        """One answer has ended."""
        self.finish_reasons[choice] = reason

    def said(self, choice: int, text: str, calls: Sequence[Any] = ()) -> None:
        """What one answer says, be it whole or not; kept only for the request log."""
        if self.records:
            self.answers[choice] = {"answer": text, **({"tool_calls": list(calls)} if calls else {})}

    def failed(self, code: str) -> None:
        """It went wrong after the status line had been sent."""
        self.error = self.error or code

    @property
    def used_tokens(self) -> int:
        """What the answer has cost so far: the prompt, and what was generated."""
        return self.prompt_tokens + self.generated

    @property
    def queue_seconds(self) -> float | None:
        """From acceptance to admission."""
        return None if self.admitted_at is None or self.asked_at is None else max(0.0, self.admitted_at - self.asked_at)

    @property
    def masking_seconds(self) -> float | None:
        """What following the form of the answers took."""
        return None if self.masking is None else self.masking.seconds

    @property
    def prefill_seconds(self) -> float | None:
        """From admission to the first token."""
        return None if self.admitted_at is None or self.first_at is None else self.first_at - self.admitted_at

    @property
    def first_token_seconds(self) -> float | None:
        """From arrival to the first token."""
        return None if self.first_at is None else self.first_at - self.began

    @property
    def seconds(self) -> float:
        """From arrival to the last byte, or until now."""
        return (time.perf_counter() if self.ended_at is None else self.ended_at) - self.began


def exchange_of(request: Request) -> Exchange:
    """The exchange of a request; a fresh one where no middleware made it (an application under test)."""
    found = request.scope.get(SCOPE)
    if found is None:
        found = request.scope[SCOPE] = Exchange("", request.method, request.url.path)
    return found
