"""How much a client may ask: exact sliding windows with reservation and refund, concurrency, and quotas by the day.

"60 requests per minute" is kept literally: no window of 60 seconds, wherever it begins, holds more. (A token bucket
of that rate and size lets nearly twice as much through within a minute.) A window is counted in 60 parts, and what was
taken in one is given free together with the latest instant of it, so memory is constant and the error, at most one
second, is on the safe side. All arithmetic is in whole nanoseconds and tokens.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from llmctl_serve.quotas import SHARED, Quotas

MINUTE = 60 * 10**9
"""Nanoseconds."""
PARTS = 60
ADDRESSES = 10_000
"""Clients without a key that are told apart; further ones share one allowance until an old one has been idle."""

Reason = Literal["requests", "tokens", "concurrency", "requests_per_day", "tokens_per_day"]


@dataclass(frozen=True)
class Limits:
    """What one key or address may do; None: as much as it likes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    requests_per_day: int | None = None
    tokens_per_day: int | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{limit.name}` must be a whole number from 1, not {value!r}")


class LimitedError(Exception):
    """A limit forbids it for `wait` nanoseconds; None: for ever, as it is more than the whole limit."""

    def __init__(self, reason: Reason, limit: int, wanted: int, wait: int | None) -> None:
        super().__init__(reason)
        self.reason, self.limit, self.wanted, self.wait = reason, limit, wanted, wait


class _Part:
    """What was taken within one part of a window."""

    __slots__ = ("number", "units")

    def __init__(self, number: int) -> None:
        self.number, self.units = number, 0


class Window:
    """At most `limit` units within any `period` nanoseconds."""

    def __init__(self, limit: int, period: int = MINUTE, parts: int = PARTS) -> None:
        self.limit, self._period, self._width = limit, period, max(1, period // parts)
        self._parts: deque[_Part] = deque()
        self._used = 0

    def _free(self, part: _Part) -> int:
        """When what was taken in this part counts no more."""
        return (part.number + 1) * self._width + self._period

    def _expire(self, now: int) -> None:
        while self._parts and self._free(self._parts[0]) <= now:
            self._used -= self._parts.popleft().units

    def remaining(self, now: int) -> int:
        """What could be taken at once."""
        self._expire(now)
        return self.limit - self._used

    def reset(self, now: int) -> int:
        """Nanoseconds until everything is free again."""
        self._expire(now)
        last = next((part for part in reversed(self._parts) if part.units), None)
        return 0 if last is None else self._free(last) - now

    def wait(self, units: int, now: int) -> int | None:
        """Nanoseconds until `units` can be taken: 0 is now, None is never."""
        if units > self.limit:
            return None
        missing = units - self.remaining(now)
        if missing <= 0:
            return 0
        for part in self._parts:
            missing -= part.units
            if missing <= 0:
                return self._free(part) - now
        raise AssertionError("the parts hold what is used")

    def take(self, units: int, now: int) -> _Part:
        """Take them (`wait` said 0); the part they are noted in is what `give_back` wants."""
        number = now // self._width
        if not self._parts or self._parts[-1].number < number:
            self._parts.append(_Part(number))
        part = self._parts[-1]
        part.units += units
        self._used += units
        return part

    def give_back(self, part: _Part, units: int, now: int) -> None:
        """Undo a part of what was taken; nothing to do where it has expired."""
        self._expire(now)
        if self._parts and part.number >= self._parts[0].number:
            part.units -= units
            self._used -= units

    @property
    def idle(self) -> bool:
        """Whether it holds nothing."""
        return not self._used


class _Client:
    """What one key or address has in use."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = Window(limits.requests_per_minute) if limits.requests_per_minute else None
        self.tokens = Window(limits.tokens_per_minute) if limits.tokens_per_minute else None
        self.running = 0

    def idle(self, now: int) -> bool:
        windows = [window for window in (self.requests, self.tokens) if window is not None]
        return not self.running and all(window.remaining(now) == window.limit for window in windows)


class Admission:
    """One request that runs. `settle` must be called once, whatever happens; a second call changes nothing."""

    def __init__(self, limiter: RateLimiter, who: str, client: _Client) -> None:
        self._limiter, self._who, self._client = limiter, who, client
        self._request: _Part | None = None
        self._tokens: _Part | None = None
        self.reserved = 0
        self._day = ""
        """When the request was counted, where there are quotas."""
        self._tokens_day = ""
        """When its tokens were: midnight may lie between the two."""
        self._settled = False

    def reserve(self, tokens: int) -> None:
        """Set tokens aside: those of the prompt, and as many as the answer may have. LimitedError refuses."""
        self._limiter._reserve(self, tokens)

    def settle(self, used: int, *, failed: bool = False) -> None:
        """The request is over: what it did not use goes back; where the server failed, everything."""
        self._limiter._settle(self, used, failed)


class RateLimiter:
    """The limits of all clients of a server. Threads may share it."""

    def __init__(
        self,
        limits: Limits,
        quotas: Quotas | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        addresses: int = ADDRESSES,
    ) -> None:
        self._limits, self._clock, self._addresses = limits, clock, addresses
        self.quotas = quotas or Quotas(None)
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, who: str, limits: Limits | None = None) -> Admission:
        """Let one request of `who` (`key:…`, or `addr:…` without keys) in; LimitedError refuses, and costs nothing."""
        with self._lock:
            now = self._clock()
            who, client = self._client(who, limits or self._limits, now)
            limit = client.limits
            if limit.concurrent is not None and client.running >= limit.concurrent:
                raise LimitedError("concurrency", limit.concurrent, 1, 10**9)
            if client.requests is not None and (wait := client.requests.wait(1, now)) != 0:
                raise LimitedError("requests", client.requests.limit, 1, wait)
            if limit.requests_per_day is not None and self.quotas.used(who).requests >= limit.requests_per_day:
                raise LimitedError("requests_per_day", limit.requests_per_day, 1, self.quotas.until_reset())
            admission = Admission(self, who, client)
            if client.requests is not None:
                admission._request = client.requests.take(1, now)
            if limit.requests_per_day is not None or limit.tokens_per_day is not None:
                admission._day = self.quotas.add(who, 1, 0)
            client.running += 1
            return admission

    def _client(self, who: str, limits: Limits, now: int) -> tuple[str, _Client]:
        client = self._clients.get(who)
        if client is None or client.limits != limits:
            if client is None and who.startswith("addr:") and not self._room(now):
                who = SHARED
                client = self._clients.get(who)
            if client is None or client.limits != limits:
                running = client.running if client else 0
                client = self._clients[who] = _Client(limits)  # limits that were changed begin anew
                client.running = running
        self._clients.move_to_end(who)
        return who, client

    def _room(self, now: int) -> bool:
        """Forget idle addresses from the least recently seen one on, until one more may be remembered."""
        while len(self._clients) >= self._addresses:
            oldest = next((name for name in self._clients if name != SHARED), None)
            if oldest is None or not self._clients[oldest].idle(now):
                return False
            del self._clients[oldest]
        return True

    def _reserve(self, admission: Admission, tokens: int) -> None:
        with self._lock:
            now, client, limit = self._clock(), admission._client, admission._client.limits
            if client.tokens is not None and (wait := client.tokens.wait(tokens, now)) != 0:
                raise LimitedError("tokens", client.tokens.limit, tokens, wait)
            if limit.tokens_per_day is not None:
                left = limit.tokens_per_day - self.quotas.used(admission._who).tokens
                if tokens > left:
                    never = tokens > limit.tokens_per_day
                    wait = None if never else self.quotas.until_reset()
                    raise LimitedError("tokens_per_day", limit.tokens_per_day, tokens, wait)
            if client.tokens is not None:
                admission._tokens = client.tokens.take(tokens, now)
            if admission._day:
                admission._tokens_day = self.quotas.add(admission._who, 0, tokens)
            admission.reserved = tokens

    def _settle(self, admission: Admission, used: int, failed: bool) -> None:
        with self._lock:
            if admission._settled:
                return
            admission._settled = True
            now, client = self._clock(), admission._client
            self._clients.get(admission._who, client).running -= 1
            back = admission.reserved if failed else max(0, admission.reserved - used)
            if back and client.tokens is not None and admission._tokens is not None:
                client.tokens.give_back(admission._tokens, back, now)
            if failed and client.requests is not None and admission._request is not None:
                client.requests.give_back(admission._request, 1, now)
            if admission._day:
                self.quotas.add(admission._who, -1 if failed else 0, 0, admission._day)
            if admission._tokens_day:
                self.quotas.add(admission._who, 0, -back, admission._tokens_day)

    def headers(self, admission: Admission) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`, for the limits per minute that there are."""
        with self._lock:
            now, found = self._clock(), {}
            for name in ("requests", "tokens"):
                window: Window | None = getattr(admission._client, name)
                if window is not None:
                    found[f"x-ratelimit-limit-{name}"] = str(window.limit)
                    found[f"x-ratelimit-remaining-{name}"] = str(window.remaining(now))
                    found[f"x-ratelimit-reset-{name}"] = duration(window.reset(now))
            return found

    def __len__(self) -> int:
        return len(self._clients)


def duration(nanoseconds: int) -> str:
    """As OpenAI writes it: `17ms`, `1s`, `6m0s`; rounded up."""
    milliseconds = -(-nanoseconds // 10**6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    seconds = -(-milliseconds // 1000)
    return f"{seconds}s" if seconds < 60 else f"{seconds // 60}m{seconds % 60}s"


def address(client: str) -> str:
    """The name under which a client without a key is counted: IPv6 by the /64 that one customer gets."""
    try:
        found = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return "addr:unknown"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return f"addr:{found.ipv4_mapped}"
        return f"addr:{ipaddress.IPv6Network((int(found) >> 64 << 64, 64))}"
    return f"addr:{found}"
