"""Load on a server: when each request begins, and when each of its tokens came.

Arrivals of an open load (Poisson) are drawn from a seed and kept whatever the server does, and every latency counts
from the intended begin: a server that stalls is charged for all who would have waited (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl_serve.bench.prompts import Prompt
from llmctl_serve.endpoint import HttpFailure, event_parts, read_event, read_usage
from llmctl_serve.http_client import HttpClient

Tick = Callable[[int, int], None]
"""Called with the requests that ended and those that began."""


@dataclass(frozen=True)
class Load:
    """How many at a time (`closed`), or how many a second (`poisson`), and until when."""

    kind: Literal["closed", "poisson"]
    value: float
    requests: int | None = None
    seconds: float | None = None
    burst: int = 1
    """Requests that arrive together; the rate stays what it is."""

    @property
    def label(self) -> str:
        """`16 at a time`, `2/s`, `2/s in bursts of 8`."""
        if self.kind == "closed":
            return f"{self.value:g} at a time"
        return f"{self.value:g}/s" + (f" in bursts of {self.burst}" if self.burst > 1 else "")

    def arrivals(self, seed: int) -> Iterator[float]:
        """Seconds after the begin at which requests of an open load are due."""
        rng, at, count = random.Random(seed), 0.0, 0
        while True:
            at += rng.expovariate(self.value / self.burst)
            for _ in range(self.burst):
                if (self.requests is not None and count >= self.requests) or (self.seconds and at >= self.seconds):
                    return
                count += 1
                yield at


@dataclass
class Record:
    """One request. Times are seconds after the load began."""

    intended: float
    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)
    """When each piece of text came."""
    end: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    """The kind of the failure."""
    message: str = ""
    retry_after: float | None = None
    """Seconds after which a server that turned it away wants it again."""
    characters: int = 0
    further: int = 0
    """Pieces of text of the other answers, where several are asked for; all times are of the first one."""

    @property
    def ok(self) -> bool:
        """Answered, with some text and an end."""
        return self.error is None

    @property
    def rejected(self) -> bool:
        """Turned away by a server that has too much to do: 429, or 503 that says when to come back.

        A 503 that does not say is a server that stops or has failed.
        """
        return self.error == "status 429" or (self.error == "status 503" and self.retry_after is not None)

    @property
    def count(self) -> int:
        """Tokens of all answers: the server's own count, else the pieces of text."""
        return len(self.tokens) + self.further if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.tokens[0] - self.intended

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: between one piece of text and the next."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first one; None for an answer of one token, or that came in one piece.

        The server counts the tokens of several answers together: the first one has its share of their pieces.
        """
        pieces = len(self.tokens)
        count = self.count * pieces / (pieces + self.further) if pieces else 0
        return (self.tokens[-1] - self.tokens[0]) / (count - 1) if count > 1 and pieces > 1 else None

    @property
    def e2e(self) -> float:
        """From the intended begin to the end."""
        return self.end - self.intended

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rounded = [round(at, 6) for at in self.tokens]
        return {**self.__dict__, "tokens": rounded}


class Runner:
    """Runs loads against one model of one server."""

    def __init__(self, client: HttpClient, model: str, chat: bool, body: dict[str, Any] | None = None) -> None:
        self.client, self.model, self.chat, self.body = client, model, chat, body or {}
        self.path = "/chat/completions" if chat else "/completions"

    async def ask(self, prompt: Prompt, started: float, intended: float) -> Record:
        """Send one request and note when its tokens come; failures are noted, not raised."""
        record = Record(intended)
        payload = prompt.payload(self.chat, self.model, self.body)
        clock = time.perf_counter

        def take(line: bytes) -> None:
            now = clock() - started
            event = read_event(line)
            if event is None:  # the answer is over, whenever the server ends its body
                record.end = now
                return
            for index, text, reason, _ in event_parts(event):
                if index != 0:
                    record.further += bool(text)
                    continue
                if text:
                    record.tokens.append(now)
                    record.characters += len(text)
                record.finish_reason = reason or record.finish_reason
            if event.get("usage"):
                record.prompt_tokens, record.completion_tokens = read_usage(event)

        record.sent = clock() - started
        try:
            await self.client.stream(self.path, payload, take)
            if not record.tokens:
                raise HttpFailure("empty answer", "the answer has no text")
        except HttpFailure as failure:
            record.error, record.message, record.retry_after = failure.kind, failure.message, failure.retry_after
            record.end = 0.0
        record.end = record.end or clock() - started
        return record

    async def run(self, load: Load, prompts: Sequence[Prompt], seed: int, tick: Tick) -> list[Record]:
        """All requests of one load, in the order in which they began; prompts are taken in turn."""
        closed = load.kind == "closed"
        return await (self._closed(load, prompts, tick) if closed else self._open(load, prompts, seed, tick))

    async def _closed(self, load: Load, prompts: Sequence[Prompt], tick: Tick) -> list[Record]:
        """So many users who ask again as soon as they are answered."""
        started = time.perf_counter()
        records: list[Record] = []
        begun = 0

        async def user() -> None:
            nonlocal begun
            while load.requests is None or begun < load.requests:
                now = time.perf_counter() - started
                if load.seconds is not None and now >= load.seconds:
                    return
                prompt = prompts[begun % len(prompts)]
                begun += 1
                records.append(await self.ask(prompt, started, now))
                tick(len(records), begun)
                if not records[-1].ok:
                    await asyncio.sleep(0.01)  # a server that refuses at once is not to be flooded

        async with asyncio.TaskGroup() as users:
            for _ in range(int(load.value)):
                users.create_task(user())
        return sorted(records, key=lambda record: record.intended)

    async def _open(self, load: Load, prompts: Sequence[Prompt], seed: int, tick: Tick) -> list[Record]:
        """Requests at their own times, however many are under way."""
        started = time.perf_counter()
        tasks: list[asyncio.Task[Record]] = []
        ended = 0

        async def one(prompt: Prompt, due: float) -> Record:
            nonlocal ended
            record = await self.ask(prompt, started, due)
            ended += 1
            tick(ended, len(tasks))
            return record

        async with asyncio.TaskGroup() as group:
            for number, due in enumerate(load.arrivals(seed)):
                wait = due - (time.perf_counter() - started)
                if wait > 0:
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(one(prompts[number % len(prompts)], due)))
        return [task.result() for task in tasks]
