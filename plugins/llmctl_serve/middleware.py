"""ASGI middleware that watches every request from outside: identity, errors, counts, logs, traces, headers."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmctl_serve.access_log import AccessLog, RequestLog
from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import SCOPE, Exchange
from llmctl_serve.headers import security_headers
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.protocol import CONNECTION
from llmctl_serve.tracing import Tracing

GONE = 499
"""Status for a request whose client left before the answer began (nginx's convention)."""
OTHER = "other"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}\Z")
"""What is taken over from a client: nothing that could forge a line or grow a log."""


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of that name, empty if there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")


class Observed:
    """Gives every request its `Exchange`, and counts, logs and traces it when it has ended.

    What the application raises ends here as a 500 in OpenAI's shape. `routes` are the paths without parameters.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServerMetrics,
        warn: Callable[[str], None],
        routes: Callable[[], frozenset[str]] = frozenset,
        access: AccessLog | None = None,
        requests: RequestLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._app, self._metrics, self._warn, self._routes = app, metrics, warn, routes
        self._access, self._requests, self._tracing = access, requests, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[SCOPE] = self._exchange(scope)
        span = self._tracing.begin(exchange) if self._tracing else None
        self._metrics.open.inc()
        try:
            await self._run(scope, receive, send, exchange)
        finally:
            self._metrics.open.dec()
            self._close(scope, exchange, span)

    def _exchange(self, scope: Scope) -> Exchange:
        given = header(scope, b"x-request-id")
        exchange = Exchange(
            given.decode() if REQUEST_ID.match(given) else f"req-{secrets.token_hex(12)}",
            scope["method"],
            scope["path"],
            client=scope["client"][0] if scope.get("client") else "",
            traceparent=header(scope, b"traceparent").decode("latin-1"),
            records=self._requests is not None,
        )
        if scope["path"] in self._routes():
            exchange.route = scope["path"]
        return exchange

    async def _run(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        ended = False
        left = False

        async def watched_receive() -> Message:
            nonlocal left
            message = await receive()
            left = left or (message["type"] == "http.disconnect" and not ended)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = security_headers(scope, message.get("headers", ()), exchange)
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                ended = True
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
        except Exception as error:  # whatever it is, a client must see an answer and never a traceback
            self._warn(f"{scope['method']} {exchange.route} failed: {type(error).__name__}: {error}")
            exchange.failed("internal_error")
            if exchange.status:
                _cut(scope)
            else:
                await _internal().response()(scope, receive, watched_send)
        if not exchange.status:
            exchange.status, left = GONE, True
        if exchange.status == GONE or (left and not ended):
            exchange.cut = exchange.cut or "client_left"

    def _close(self, scope: Scope, exchange: Exchange, span: Any) -> None:
        exchange.ended_at = time.perf_counter()
        exchange.route = getattr(scope.get("route"), "path", None) or exchange.route
        self._metrics.ended(exchange)
        if self._access is not None:
            self._access.write(exchange)
        if self._requests is not None:
            self._requests.write(exchange)
        if self._tracing is not None:
            self._tracing.end(span, exchange)


def _internal() -> ApiError:
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def _cut(scope: Scope) -> bool:
    """End a connection whose answer cannot be completed, its bytes unsent; False where the server has no such door."""
    cut = scope.get("extensions", {}).get(CONNECTION, {}).get("cut")
    if cut is not None:
        cut()
    return cut is not None


class Deadlines:
    """Ends what takes too long: a request as a whole, the wait for its first token, a client that does not read.

    A request that has answered nothing yet gets 504 (or 503, where the queue was too long); a stream ends with an error
    event. Cancelling the application's task frees its place in the engine. 0 switches a limit off.
    """

    def __init__(self, app: ASGIApp, total: float, first_token: float, write: float) -> None:
        self._app, self._total, self._first_token, self._write = app, total, first_token, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Timed(scope, receive, send, self._total, self._first_token, self._write).run(self._app)


class _Timed:
    """One request under deadlines."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, total: float, first_token: float, write: float
    ) -> None:
        self._scope, self._receive, self._inner_send, self._write = scope, receive, send, write
        self._exchange: Exchange = scope[SCOPE]
        self._total, self._first_token = total, first_token
        self._started = self._stream = self._ended = self._waited = False

    async def run(self, app: ASGIApp) -> None:
        loop = asyncio.get_running_loop()
        timer = None
        try:
            async with asyncio.timeout(self._total or None) as limit:
                if self._first_token:

                    def look() -> None:
                        nonlocal timer
                        if (left := self._left()) is None:
                            return
                        if left > 0:
                            timer = loop.call_later(left, look)
                            return
                        self._waited = True
                        limit.reschedule(loop.time())

                    timer = loop.call_later(self._first_token, look)
                await app(self._scope, self._receive, self._send)
        except TimeoutError:
            if not limit.expired():
                raise
            await self._give_up()
        finally:
            if timer is not None:
                timer.cancel()

    def _left(self) -> float | None:
        """Seconds that the first token may still take; None where none is awaited any more, or at all."""
        exchange = self._exchange
        if self._ended or exchange.first_at is not None:
            return None
        if exchange.asked_at is None:  # its body is still read or checked: the wait has not begun
            return self._first_token
        if not exchange.max_tokens:  # vectors, scores of a prompt
            return None
        if exchange.at_once and exchange.admitted_at is not None:  # its tokens come together, as those of beams do
            return None
        return exchange.asked_at + self._first_token - time.perf_counter()

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self._stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self._ended = True
        if not self._write:
            await self._inner_send(message)
            return
        try:
            # uvicorn keeps at most 64 KiB for a client; then this waits until some of it is taken.
            async with asyncio.timeout(self._write):
                await self._inner_send(message)
        except TimeoutError:
            self._ended, self._exchange.cut = True, "slow_client"
            if not _cut(self._scope):
                raise
            # The application learns of it as of any client that leaves.

    async def _give_up(self) -> None:
        exchange = self._exchange
        if self._ended:
            return
        exchange.cut = "timeout"
        if self._waited:
            error = ApiError(
                503,
                f"no token within {self._first_token:g} seconds: the server has too much to do",
                code="first_token_timeout",
                headers={"Retry-After": "5"},
            )
        else:
            error = ApiError(504, f"the answer took longer than {self._total:g} seconds", code="timeout")
        exchange.failed(error.code or "timeout")
        if not self._started:
            await error.response()(self._scope, self._receive, self._send)
        elif self._stream:
            await self._send({"type": "http.response.body", "body": error.event(), "more_body": False})
        else:
            _cut(self._scope)


class Heads:
    """Answers HEAD as GET without the body (RFC 9110, 9.3.2): monitors ask like that."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}

        async def bare(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        try:
            await self._app(asked, receive, bare)
        finally:
            scope["route"] = asked.get("route")


class Body:
    """Reads the whole body before the application sees the request: within `limit` bytes and `seconds`.

    413 for what is larger, declared or streamed; 408 for what does not arrive. Every body here is JSON, which is
    parsed as a whole anyway.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float = 0) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds or None):
                body = await self._read(scope, receive)
        except TimeoutError:
            message = f"the body of the request did not arrive within {self._seconds:g} seconds"
            await _closing(408, message, "timeout").response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client has left
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        too_large = _closing(413, f"the request body is larger than {self._limit} bytes", "body_too_large")
        declared = header(scope, b"content-length")
        if declared.isdigit() and int(declared) > self._limit:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limit:
                raise too_large
            if not message.get("more_body"):
                return bytes(body)


def _closing(status: int, message: str, code: str) -> ApiError:
    return ApiError(status, message, code=code, headers={"Connection": "close"})
