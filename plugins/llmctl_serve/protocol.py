"""uvicorn's HTTP protocol with the limits that it lacks: time and size of a request's head, number of connections.

uvicorn closes idle connections (`timeout_keep_alive`), but waits for ever for the rest of a head, and of any length, or
for a client to take the rest of an answer. It keeps trailers of any number, any number of requests that are sent ahead,
and loses the body of a request that asks for another protocol, as Java's client does (`Upgrade: h2c`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmctl_serve.errors import ApiError

CONNECTION = "llmctl.connection"
"""Where the function that cuts the connection lies in the scope's extensions."""
AHEAD = 100
"""Requests that a client may send before their turn comes; one that sends more is cut off."""
STATUS = {400: "400 Bad Request", 408: "408 Request Timeout", 503: "503 Service Unavailable"}


def limited_protocol(
    head_seconds: float, head_bytes: int, connections: int, write_seconds: float
) -> type[asyncio.Protocol]:
    """A protocol class for `uvicorn.Config(http=…)` with these limits; 0 seconds for a write: no limit."""

    class Limited(LimitedProtocol):
        limits = (head_seconds, head_bytes, connections)
        untaken = write_seconds

    return Limited


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    limits: tuple[float, int, int]
    """Seconds and bytes of a request's head, and how many connections there may be."""
    untaken: float
    """Seconds after which a client is dropped that takes nothing more of a complete answer."""
    _timer: asyncio.TimerHandle | None = None
    _flushing: asyncio.TimerHandle | None = None
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
        self._head += len(data)
        self._unset_keepalive_if_required()
        try:
            while data and not self.transport.is_closing():
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                    self._read_as_plain()  # then what follows, which may wish again
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._head > self.limits[1] and not self.transport.is_closing():
            self._refuse(431, _too_large(self.limits[1]), "headers_too_large")

    def _read_as_plain(self) -> None:
        """A request that asks for another protocol is one of HTTP/1.1 all the same (RFC 9110, 7.8).

        llhttp stops behind the head of such a request: the head is read again without the wish; its body comes then.
        Raises HttpParserError for CONNECT, which wants no HTTP at all.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError("CONNECT")
        version = self.parser.get_http_version().encode()
        wishes = (b"connection", b"upgrade", b"http2-settings")
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in wishes]
        if any(b"close" in value.lower() for name, value in self.headers if name == b"connection"):
            lines.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")

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
        """One header; a trailer is read and dropped, as what it says would come too late to be checked."""
        if not self._in_head:
            return
        super().on_header(name, value)
        self._head_size += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        """The head is there: the application may begin."""
        if self.transport.is_closing() or self.parser.should_upgrade():
            return
        self._stop_waiting()
        self._in_head, self._head = False, 0
        if len(self.pipeline) >= AHEAD:
            self.transport.abort()
            return
        own = self.app
        if self._head_size > self.limits[1]:
            self.app = _head_too_large(self.limits[1])
        elif fault := head_fault(self.parser.get_http_version(), self.headers):
            self.app = _refusing(ApiError(400, fault, code="invalid_http", headers={"Connection": "close"}))
        try:
            super().on_headers_complete()
        finally:
            self.app = own

    def on_body(self, body: bytes) -> None:
        """A part of the body: what is counted is bytes without any, such as trailers."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there: what follows is the head of the next one."""
        self._head = 0
        if not self.parser.should_upgrade():  # else only its head was read, and is read again
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The application has said everything; what lies here of it must be taken too."""
        super().on_response_complete()
        self._watch_flush()

    def _watch_flush(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left and self.untaken and self._flushing is None:
            self._flushing = self.loop.call_later(self.untaken, self._look, left)

    def _look(self, before: int) -> None:
        """Whether the client has taken anything. Who sends an answer that is on its way watches it."""
        self._flushing = None
        if self._answering:
            return
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._watch_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_waiting()
        if self._flushing is not None:
            self._flushing.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so as every other error is."""
        self._refuse(400, "this is no valid HTTP request", "invalid_http")

    @property
    def _answering(self) -> bool:
        """Whether an earlier answer is awaited or on its way, so that bytes in between would be taken for a part of it.

        A fault in the body of the request itself can still be told, until its answer begins.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return bool(cycle.response_started or not cycle.more_body or self.pipeline)

    def _refuse(self, status: int, message: str, code: str) -> None:
        self._stop_waiting()
        if self._answering:
            self.transport.close()
            return
        body = json.dumps(ApiError(status, message, code=code).body()).encode()
        head = (
            f"HTTP/1.1 {STATUS.get(status, f'{status} Refused')}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
        self._watch_flush()


def _too_large(limit: int) -> str:
    return f"the head of the request is larger than {limit} bytes"


def _head_too_large(limit: int) -> Any:
    return _refusing(ApiError(431, _too_large(limit), code="headers_too_large", headers={"Connection": "close"}))


def _refusing(error: ApiError) -> Any:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await error.response()(scope, receive, send)

    return refuse


def head_fault(version: str, headers: Sequence[tuple[bytes, bytes]]) -> str:
    """What is wrong with a head that llhttp lets pass, "" if nothing (RFC 9112, 3.2 and 6.1)."""
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (not hosts and version == "1.1"):
        return f"the request has {hosts} headers `Host`, not one"
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings not in ([], [b"chunked"]):
        return "no transfer coding but `chunked` is understood"
    return ""
