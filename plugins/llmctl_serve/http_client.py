"""An asyncio HTTP/1.1 client for JSON and server-sent events, on the standard library's streams alone.

A load generator must cost less than what it measures: here an event is one `readline`, the time is taken before
anything is parsed, and connections are kept open and used again.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from llmctl_serve.endpoint import Endpoint, HttpFailure, error_text, read_retry_after

LIMIT = 1 << 22
"""Longest line of a response: an event with many alternatives per token is long."""
MOST_BODY = 1 << 28


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    fresh: bool = True
    """Not used before: a failure on it is the server's."""


@dataclass
class Reply:
    """The head of a response; its body is read once, by `read` or by `lines`."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    done: bool = False
    """The body was read to its end, so the connection is good for another request."""

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request."""
        return self.done and self.headers.get("connection", "").lower() != "close" and self._delimited

    @property
    def _delimited(self) -> bool:
        return "content-length" in self.headers or self._chunked

    @property
    def _chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if self._chunked:
            while size := int((await self.reader.readuntil(b"\n")).split(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:size]
            while (await self.reader.readuntil(b"\n")).strip():
                pass  # trailers
        elif "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left:
                piece = await self.reader.read(min(left, 1 << 16))
                if not piece:
                    raise asyncio.IncompleteReadError(b"", left)
                left -= len(piece)
                yield piece
        else:
            while piece := await self.reader.read(1 << 16):
                yield piece
        self.done = True

    async def read(self) -> bytes:
        """The whole body."""
        body = b""
        async for piece in self.pieces():
            body += piece
            if len(body) > MOST_BODY:
                raise HttpFailure("too large", f"the response has more than {MOST_BODY} bytes")
        return body

    async def lines(self) -> AsyncIterator[bytes]:
        """The lines of the body, without their ends; a last one without an end is dropped, as it is not whole."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line.rstrip(b"\r")


class HttpClient:
    """Requests to one endpoint. Every failure is an HttpFailure, a passed `timeout` (seconds) among them."""

    def __init__(self, endpoint: Endpoint, timeout: float = 600.0) -> None:
        self.endpoint, self.timeout = endpoint, timeout
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if endpoint.tls else None

    async def close(self) -> None:
        """Close what is open."""
        while self._idle:
            self._idle.pop().writer.close()
        await asyncio.sleep(0)

    async def get(self, path: str, base: bool = True) -> dict[str, Any]:
        """The JSON at a path below the base, or below the root."""
        return await self._json("GET", (self.endpoint.base if base else "") + path, b"")

    async def text(self, path: str) -> str:
        """The text at a path below the root."""
        return (await self._whole("GET", path, b"")).decode(errors="replace")

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON that answers `body`."""
        return await self._json("POST", self.endpoint.base + path, json.dumps(body).encode())

    async def stream(self, path: str, payload: bytes, take: Callable[[bytes], None]) -> None:
        """Give `take` each line `data: …` of the events that answer a JSON body, to be read with `read_event`.

        HttpFailure "broken off" if the stream ends without `[DONE]`.
        """
        ended = False
        async with self._exchange("POST", self.endpoint.base + path, payload) as reply:
            if reply.status != 200:
                raise await _refusal(reply)
            if not reply.headers.get("content-type", "").startswith("text/event-stream"):
                raise HttpFailure("no stream", error_text(await reply.read()))
            async for line in reply.lines():
                if line.startswith(b"data:"):
                    ended = ended or line[5:].strip() == b"[DONE]"
                    take(line)
        if not ended:
            raise HttpFailure("broken off", "the stream ended without [DONE]")

    async def _json(self, method: str, path: str, payload: bytes) -> dict[str, Any]:
        raw = await self._whole(method, path, payload)
        try:
            found = json.loads(raw)
        except ValueError as error:
            raise HttpFailure("bad JSON", f"{path} answered what is no JSON: {error_text(raw)}") from error
        if not isinstance(found, dict):
            raise HttpFailure("bad JSON", f"{path} answered no JSON object")
        return found

    async def _whole(self, method: str, path: str, payload: bytes) -> bytes:
        async with self._exchange(method, path, payload) as reply:
            if reply.status != 200:
                raise await _refusal(reply)
            return await reply.read()

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, payload: bytes) -> AsyncIterator[Reply]:
        """One reply, whose connection is kept if it was read to the end, and closed otherwise."""
        try:
            async with asyncio.timeout(self.timeout):
                connection, reply = await self._send(method, path, payload)
                try:
                    yield reply
                finally:
                    if reply.reusable:
                        connection.fresh = False
                        self._idle.append(connection)
                    else:
                        connection.writer.close()
        except TimeoutError as error:
            raise HttpFailure("timeout", f"no whole answer within {self.timeout:g} s") from error
        except asyncio.IncompleteReadError as error:
            raise HttpFailure("broken off", "the server closed the connection within its answer") from error
        except (asyncio.LimitOverrunError, ValueError) as error:
            raise HttpFailure("protocol", f"the answer is no HTTP/1.1: {error}") from error
        except OSError as error:
            raise HttpFailure("broken off", f"the connection broke: {error}") from error

    async def _send(self, method: str, path: str, payload: bytes) -> tuple[_Connection, Reply]:
        """Send a request; once more on a new connection if the server had closed the one that was kept."""
        head = "".join(f"{name}: {value}\r\n" for name, value in self.endpoint.headers.items())
        request = f"{method} {path} HTTP/1.1\r\n{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload
        while True:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                connection.writer.write(request)
                await connection.writer.drain()
                return connection, await _read_head(connection.reader)
            except (OSError, asyncio.IncompleteReadError):
                connection.writer.close()
                if connection.fresh:
                    raise
            except BaseException:
                connection.writer.close()
                raise

    async def _connect(self) -> _Connection:
        host, port = self.endpoint.host, self.endpoint.port
        try:
            return _Connection(*await asyncio.open_connection(host, port, ssl=self._tls, limit=LIMIT))
        except OSError as error:
            raise HttpFailure("no connection", f"nothing answers at {self.endpoint.address}: {error}") from error


async def _refusal(reply: Reply) -> HttpFailure:
    """What a status other than 200 says."""
    return HttpFailure(f"status {reply.status}", error_text(await reply.read()), read_retry_after(reply.headers))


async def _read_head(reader: asyncio.StreamReader) -> Reply:
    while True:
        status_line = await reader.readuntil(b"\n")
        words = status_line.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise ValueError(status_line[:60].decode(errors="replace"))
        headers = {}
        while line := (await reader.readuntil(b"\n")).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        if not words[1].startswith(b"1"):  # 100 Continue and its like come before the answer
            return Reply(int(words[1]), headers, reader)
