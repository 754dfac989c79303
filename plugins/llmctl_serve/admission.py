"""ASGI middleware that decides who may ask: host and origin of a browser, API key, rate limits."""

from __future__ import annotations

import asyncio
import ipaddress
import math
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import SCOPE, Exchange
from llmctl_serve.keys import Key, Keys
from llmctl_serve.middleware import header
from llmctl_serve.rate_limits import Admission, LimitedError, RateLimiter, Reason, address

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LIMITED = ("POST",)
"""Methods under /v1 that cost something, and so count."""
WORDS: dict[Reason, str] = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "concurrency": "requests at a time",
    "requests_per_day": "requests per day",
    "tokens_per_day": "tokens per day",
}
BEARER = {"WWW-Authenticate": 'Bearer realm="llmctl"'}
SCOPED = {"WWW-Authenticate": 'Bearer realm="llmctl", error="insufficient_scope"'}
"""RFC 6750, section 3.1."""


class Origins:
    """Refuses what a foreign web page could send: a name of this machine that it does not go by, a foreign origin.

    A page whose domain resolves to 127.0.0.1 (DNS rebinding) has its own name in `Host`, and one that posts a form has
    its own in `Origin`. Addresses in figures are always good: no page has them as its name. With `hosts` empty any
    name goes.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._app, self._origins = app, frozenset(origins)
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        host = header(scope, b"host").decode("latin-1").lower()
        if self._hosts and host and not self._known(_without_port(host)):
            message = "this server does not go by the name in the header `Host`; name it in allowed_hosts"
            return ApiError(421, message, code="host_not_allowed")
        origin = header(scope, b"origin").decode("latin-1").lower()
        own = origin.partition("://")[2] == host
        if origin and scope["method"] not in SAFE_METHODS and not own and not {origin, "*"} & self._origins:
            message = "pages of this origin may not use the server; name it in cors_origins"
            return ApiError(403, message, code="origin_not_allowed")
        return None

    def _known(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self._hosts or any(host.startswith("*.") and name.endswith(host[1:]) for host in self._hosts)
        return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def needed_scope(path: str, protected: Sequence[str]) -> str | None:
    """What a key must be allowed for this path; None: no key is needed."""
    if any(path == start or path.startswith(f"{start}/") for start in protected):
        return "admin"
    return "inference" if path == "/v1" or path.startswith("/v1/") else None


class Admissions:
    """401 and 403 by the key, 429 by the limits; reservations are settled when the request has ended.

    `keys` None lets everybody in, counted by address, but to nothing of `admin`, the paths that need that scope.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, limiter: RateLimiter, admin: Sequence[str]) -> None:
        self._app, self._keys, self._limiter, self._admin = app, keys, limiter, admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI
        needed = needed_scope(scope["path"], self._admin) if scope["type"] == "http" else None
        if needed is None:
            await self._app(scope, receive, send)
            return
        exchange: Exchange = scope[SCOPE]
        try:
            key = self._check_key(scope, exchange, needed)
            admission = self._admit(exchange, key) if scope["method"] in LIMITED and needed == "inference" else None
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if admission is None:
            await self._app(scope, receive, send)
            return
        await self._run(scope, receive, send, admission)

    async def _run(self, scope: Scope, receive: Receive, send: Send, admission: Admission) -> None:
        exchange: Exchange = scope[SCOPE]

        def reserve(asked: Exchange) -> None:
            try:
                admission.reserve(asked.prompt_tokens + asked.max_tokens)
            except LimitedError as error:
                raise self._limited(asked, error) from None

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.headers = {**exchange.headers, **self._limiter.headers(admission)}
            await send(message)

        exchange.on_asked = reserve
        broken = True
        try:
            await self._app(scope, receive, watched)
            broken = exchange.status >= 500
        except asyncio.CancelledError:  # a deadline: an answer that took longer than it may has cost what it has cost
            broken = not exchange.generated
            raise
        except BaseException:
            broken = exchange.status == 0 or exchange.status >= 500
            raise
        finally:
            # Without an engine's work, as in a queue that was left, the prompt has cost nothing.
            admission.settle(exchange.used_tokens if exchange.admitted_at is not None else 0, failed=broken)
            if self._limiter.quotas.due():
                self._limiter.quotas.save_beside()

    def _check_key(self, scope: Scope, exchange: Exchange, needed: str) -> Key | None:
        if self._keys is None:
            # A request from this machine may be one that a proxy passes on for somebody else, and need not say so.
            if needed == "admin":
                message = (
                    "without API keys nobody may administer the server; `llmctl keys create --scope admin` makes one"
                )
                raise ApiError(403, message, code="missing_scope")
            return None
        scheme, _, given = header(scope, b"authorization").partition(b" ")
        key = self._keys.find(given.strip()) if scheme.lower() == b"bearer" else None
        if key is None:
            message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers=BEARER)
        exchange.key_id = key.id
        if needed not in key.scopes:
            message = f"the API key is not meant for this; it lacks the scope `{needed}`"
            raise ApiError(403, message, code="missing_scope", headers=SCOPED)
        return key

    def _admit(self, exchange: Exchange, key: Key | None) -> Admission:
        who = f"key:{key.id}" if key else address(exchange.client)
        try:
            return self._limiter.admit(who, key.limits if key else None)
        except LimitedError as error:
            raise self._limited(exchange, error) from None

    def _limited(self, exchange: Exchange, error: LimitedError) -> ApiError:
        exchange.failed(f"rate_limit_{error.reason}")
        code = "insufficient_quota" if error.reason.endswith("day") else "rate_limit_exceeded"
        limit = f"the limit of {error.limit} {WORDS[error.reason]}"
        headers: dict[str, Any] = {}
        if error.wait is None:
            headers["x-should-retry"] = "false"
            message = f"{error.wanted} tokens are more than {limit} allows at all"
            return ApiError(429, message, code=code, headers=headers)
        seconds = max(1, math.ceil(error.wait / 1e9))
        headers["Retry-After"] = str(seconds)
        headers["retry-after-ms"] = str(max(1, math.ceil(error.wait / 1e6)))
        return ApiError(429, f"{limit} is reached; try again in {seconds} s", code=code, headers=headers)
