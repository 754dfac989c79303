"""uvicorn's HTTP protocol with the limits that it lacks: time and size of a request's head, number of connections.

uvicorn closes idle connections (`timeout_keep_alive`), but waits for ever for the rest of a head, and of any length.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmctl_serve.errors import ApiError

CONNECTION = "llmctl.connection"
"""Where the function that cuts the connection lies in the scope's extensions."""
STATUS = {400: "400 Bad Request", 408: "408 Request Timeout", 503: "503 Service Unavailable"}


def limited_protocol(head_seconds: float, head_bytes: int, connections: int) -> type[asyncio.Protocol]:
    """A protocol class for `uvicorn.Config(http=…)` with these limits."""

    class Limited(LimitedProtocol):
        limits = (head_seconds, head_bytes, connections)

    return Limited


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    limits: tuple[float, int, int]
    """Seconds and bytes of a request's head, and how many connections there may be."""
    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connects: it has to say something within the time of a head."""
        super().connection_made(transport)
        if len(self.connections) > self.limits[2]:
            self._refuse(503, "too many connections", "too_many_connections")
            return
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self.limits[0], self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._head:
            self._refuse(408, f"the head of the request did not arrive within {self.limits[0]:g} seconds", "timeout")
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Bytes arrive."""
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > self.limits[1] and not self.transport.is_closing():
            self._refuse(431, _too_large(self.limits[1]), "headers_too_large")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._head_size = True, 0
        self._wait_for_head()
        extensions: dict[str, Any] = {CONNECTION: {"cut": self.transport.abort}}
        self.scope["extensions"] = extensions

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        super().on_url(url)
        self._head_size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self._head_size += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        """The head is there: the application may begin."""
        self._stop_waiting()
        self._in_head, self._head = False, 0
        own = self.app
        if self._head_size > self.limits[1]:
            self.app = _head_too_large(self.limits[1])
        try:
            super().on_headers_complete()
        finally:
            self.app = own

    def on_response_complete(self) -> None:
        """The answer is out: the next request's head begins with its first byte."""
        self._in_head, self._head = True, 0
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so as every other error is."""
        self._refuse(400, "this is no valid HTTP request", "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        self._stop_waiting()
        body = json.dumps(ApiError(status, message, code=code).body()).encode()
        head = (
            f"HTTP/1.1 {STATUS.get(status, f'{status} Refused')}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _too_large(limit: int) -> str:
    return f"the head of the request is larger than {limit} bytes"


def _head_too_large(limit: int) -> Any:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(431, _too_large(limit), code="headers_too_large", headers={"Connection": "close"})
        await error.response()(scope, receive, send)

    return refuse
