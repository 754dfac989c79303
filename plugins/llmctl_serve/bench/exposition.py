"""What a server says of itself while it is measured: Prometheus' text at `/metrics`.

Every server with Prometheus' usual process metrics shows its resident memory; counts of requests and the sizes of its
batches are read where it is `llmctl serve`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from llmctl_serve.bench.load import Record
from llmctl_serve.endpoint import Endpoint, HttpFailure
from llmctl_serve.http_client import HttpClient

MEMORY = "process_resident_memory_bytes"
ROUTES = ("/v1/chat/completions", "/v1/completions")
EVERY = 1.0
"""Seconds between two looks at the memory while a load runs."""
PATIENCE = 10.0
"""Seconds that one look may take."""
SETTLE = 1.0
"""Seconds that the server has to count the requests that it answered last."""
FEW = 8
"""Samples in the second half of a load below which its growth is not told."""
HEARD = ("empty answer", "error event", "bad event", "no stream")
"""Failures of an answer whose status was 200."""
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?[ \t]+(\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Exposition:
    """The samples of one scrape: (name, labels, value)."""

    samples: Sequence[tuple[str, Mapping[str, str], float]]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric over the labels that are left open; 0 if the server has none of that name."""
        return sum(value for one, own, value in self.samples if one == name and labels.items() <= own.items())

    def has(self, name: str) -> bool:
        """Whether the server shows a metric."""
        return any(one == name for one, _, _ in self.samples)

    def statuses(self) -> Counter[str]:
        """Requests for answers by their status, since the server began."""
        found: Counter[str] = Counter()
        for name, labels, value in self.samples:
            if name == "llmctl_requests_total" and labels.get("route") in ROUTES:
                found[labels["status"]] += int(value)
        return found


def parse_exposition(text: str) -> Exposition:
    """The samples of Prometheus' text format; comments, and lines that are no samples, say nothing."""
    samples = []
    for name, labels, value in _SAMPLE.findall(text):
        with suppress(ValueError):
            samples.append((name, dict(_LABEL.findall(labels)), float(value)))
    return Exposition(samples)


@dataclass
class Watched:
    """What was seen of the server beside one load."""

    before: Exposition | None = None
    after: Exposition | None = None
    memory: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the load began, resident bytes)."""


class Watch:
    """Looks at `/metrics` before, during and after a load."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._client = HttpClient(endpoint, PATIENCE)
        self._path = endpoint.base.removesuffix("/v1") + "/metrics"
        self.missing = ""
        """Why there is nothing to see; empty where there is."""

    async def open(self) -> None:
        """Find out whether the server shows metrics."""
        try:
            found = parse_exposition(await self._client.text(self._path))
        except HttpFailure as failure:
            self.missing = failure.kind
        else:
            self.missing = "" if found.samples else "no Prometheus text"

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[Watched]:
        """Look at the server before and after the block, and at its memory every second meanwhile."""
        watched = Watched()
        if self.missing:
            yield watched
            return
        await self._settle()
        started = time.perf_counter()
        watched.before = await self._look(watched, started)
        sampling = asyncio.create_task(self._sample(watched, started))
        try:
            yield watched
        finally:
            sampling.cancel()
            with suppress(asyncio.CancelledError):
                await sampling
        await self._settle()
        watched.after = await self._look(watched, started)

    async def _look(self, watched: Watched, started: float) -> Exposition | None:
        """The samples now; None where the server does not answer in time, as one under load may do."""
        try:
            found = parse_exposition(await self._client.text(self._path))
        except HttpFailure:
            return None
        if found.has(MEMORY):
            watched.memory.append((time.perf_counter() - started, found.total(MEMORY)))
        return found

    async def _sample(self, watched: Watched, started: float) -> None:
        while True:
            await asyncio.sleep(EVERY)
            await self._look(watched, started)

    async def _settle(self) -> None:
        """Wait until the server has counted all: the last byte of an answer leaves before its request is counted."""
        deadline = time.perf_counter() + SETTLE
        while time.perf_counter() < deadline:
            with suppress(HttpFailure):
                found = parse_exposition(await self._client.text(self._path))
                if found.total("llmctl_open_requests") <= 1:  # the one that asks is open itself
                    return
            await asyncio.sleep(0.02)


def describe(watched: Watched, model: str, records: Sequence[Record]) -> dict[str, Any] | None:
    """What the server's own metrics say of a load, for the result; None where it shows none."""
    before, after = watched.before, watched.after
    if before is None or after is None:
        return None
    found: dict[str, Any] = {}
    if watched.memory:
        found["memory"] = describe_memory(watched.memory)
    if not after.has("llmctl_build_info"):
        return found

    def grown(name: str, model: str = model) -> int:
        return int(after.total(name, model=model) - before.total(name, model=model))

    found["requests"] = dict(sorted((after.statuses() - before.statuses()).items()))
    found["prompt_tokens"], found["completion_tokens"] = (
        grown("llmctl_prompt_tokens_total"),
        grown("llmctl_completion_tokens_total"),
    )
    engine = model  # an adapter, `MODEL:ADAPTER`, is advanced by the engine of its model
    if not any(name == "llmctl_batch_size_count" and own.get("model") == model for name, own, _ in after.samples):
        engine = model.rpartition(":")[0]
    found["passes"] = grown("llmctl_batch_size_count", engine)
    advanced = grown("llmctl_batch_size_sum", engine)
    found["mean_batch"] = advanced / found["passes"] if found["passes"] else None
    found["agrees"] = agrees(found["requests"], records)
    return found


def agrees(statuses: Mapping[str, int], records: Sequence[Record]) -> bool | None:
    """Whether the server counted what the client did, status by status.

    None where a request broke off: only one of the two knows how far it came.
    """
    own: Counter[str] = Counter()
    for record in records:
        if record.ok or record.error in HEARD:
            own["200"] += 1
        elif record.error and record.error.startswith("status "):
            own[record.error.removeprefix("status ")] += 1
        else:
            return None
    return own == Counter(statuses)


def describe_memory(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Resident bytes: first, last, largest; and by what share they grew in the second half of the load.

    A server takes memory until every slot and buffer was used once, so only later growth is a leak: the median of the
    last quarter of the second half over that of its first quarter, as a single sample may catch a passing peak.
    """
    values = [value for _, value in samples]
    end = samples[-1][0]
    late = [value for at, value in samples if at > end / 2]
    quarter = len(late) // 4
    growth = median(late[-quarter:]) / median(late[:quarter]) - 1 if len(late) >= FEW else None
    return {
        "first": values[0],
        "last": values[-1],
        "largest": max(values),
        "late_growth": growth,
        "samples": [[round(at, 3), value] for at, value in samples],
    }
