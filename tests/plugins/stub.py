"""A server of OpenAI's API with planned delays and faults, on raw asyncio, for what only talks to servers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Plan:
    """What the server does with one request."""

    text: list[str] = field(default_factory=lambda: ["one", " two", " three"])
    ttft: float = 0.0
    itl: float = 0.0
    fault: str = ""
    """`status`, `broken` (after the first token), `cut` (no [DONE]), `hang`, `error event`, `garbage`, `close`."""
    logprobs: bool = False
    finish: str = "stop"
    usage: bool = True
    status: int = 500
    """Of the fault `status`, with these headers."""
    headers: dict[str, str] = field(default_factory=dict)


class Stub:
    """Runs in a thread within a `with` block; `plan(number, body)` says what happens to each request."""

    def __init__(self, plan: Callable[[int, dict[str, Any]], Plan] = lambda number, body: Plan()) -> None:
        self.plan = plan
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.disconnected = 0
        self.models = ["stub"]
        self.metrics: Callable[[], str] | None = None
        """The text at `/metrics`; None: there is none."""
        self.connections = 0
        self._ready = threading.Event()

    def __enter__(self) -> Stub:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._connection(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=1000)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while line := await reader.readline():
                path = line.split()[1].decode()
                headers = {}
                while header := (await reader.readline()).strip():
                    name, _, value = header.decode().partition(":")
                    headers[name.lower()] = value.strip()
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._answer(path, headers, json.loads(raw) if raw else {}, writer):
                    return
        except OSError:
            self.disconnected += 1
        finally:
            writer.close()

    async def _answer(self, path: str, headers: dict, body: dict, writer: asyncio.StreamWriter) -> bool:
        if path.endswith("/models"):
            return await self._json(writer, 200, {"data": [{"id": name} for name in self.models]})
        if path == "/metrics":
            if self.metrics is None:
                return await self._json(writer, 404, {"error": {"message": "no such path"}})
            return await self._send(writer, 200, "text/plain; version=0.0.4", self.metrics().encode())
        self.paths.append(path)
        self.headers.append(headers)
        self.bodies.append(body)
        plan = self.plan(len(self.bodies) - 1, body)
        if plan.fault == "close":
            return False
        if plan.fault == "garbage":
            writer.write(b"what?\r\n\r\n")
            return False
        if plan.fault == "status":
            return await self._json(writer, plan.status, {"error": {"message": "planted"}}, plan.headers)
        if not body.get("stream"):
            await asyncio.sleep(plan.ttft)
            return await self._json(writer, 200, self._whole(path, body, plan))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(plan.ttft)
        if plan.fault == "hang":
            await asyncio.sleep(3600)
        for number, text in enumerate(plan.text):
            if number and plan.itl:
                await asyncio.sleep(plan.itl)
            for index in range(body.get("n") or 1):
                self._event(writer, self._choice(path, text, plan, index=index))
            await writer.drain()
            if plan.fault == "broken":
                return False
            if plan.fault == "error event":
                self._event(writer, {"error": {"message": "planted"}})
        self._event(writer, self._choice(path, "", plan, plan.finish))
        if plan.usage and body.get("stream_options", {}).get("include_usage"):
            self._event(writer, {"choices": [], "usage": self._usage(body, plan)})
        if plan.fault != "cut":
            self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    @staticmethod
    def words(body: dict[str, Any]) -> int:
        """Tokens of the prompt: one per word, and 5 for the template."""
        texts = [message["content"] for message in body["messages"]] if "messages" in body else [body["prompt"]]
        return 5 + sum(len(text.split()) for text in texts)

    def _usage(self, body: dict, plan: Plan) -> dict[str, int]:
        counts = self.words(body), len(plan.text) * (body.get("n") or 1)
        return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}

    def _whole(self, path: str, body: dict, plan: Plan) -> dict[str, Any]:
        text, usage = "".join(plan.text), self._usage(body, plan)
        said = {"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text}
        choices = [{"index": i, "finish_reason": plan.finish, **said} for i in range(body.get("n") or 1)]
        if plan.logprobs and body.get("logprobs"):
            for choice in choices:
                choice["logprobs"] = {"content": [self._score(part) for part in plan.text]}
        return {"choices": choices, **({"usage": usage} if plan.usage else {})}

    @staticmethod
    def _score(text: str) -> dict[str, Any]:
        top = [{"token": text, "logprob": -0.1}, {"token": "<b>other</b>", "logprob": -2.5}]
        return {"token": text, "logprob": -0.1, "top_logprobs": top}

    def _choice(self, path: str, text: str, plan: Plan, reason: str | None = None, index: int = 0) -> dict[str, Any]:
        said = {"delta": {"content": text}} if "chat" in path else {"text": text}
        scores = {"logprobs": {"content": [self._score(text)]}} if plan.logprobs and text else {}
        return {"choices": [{"index": index, "finish_reason": reason, **said, **scores}]}

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def _json(
        self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> bool:
        return await self._send(writer, status, "application/json", json.dumps(body).encode(), headers or {})

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, kind: str, raw: bytes, headers: dict[str, str] | None = None
    ) -> bool:
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        await writer.drain()
        return True
