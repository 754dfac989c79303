"""Everything around the application: one object that a server opens, puts around its routes, and closes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from llmctl.spec.files import home_path
from llmctl_serve.access_log import AccessLog, RequestLog
from llmctl_serve.admission import Admissions, Origins
from llmctl_serve.files import LineLog
from llmctl_serve.keys import Keys
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.middleware import Body, Deadlines, Heads, Observed
from llmctl_serve.protocol import limited_protocol
from llmctl_serve.quotas import Quotas
from llmctl_serve.rate_limits import RateLimiter
from llmctl_serve.safety import SafetyParams
from llmctl_serve.tracing import Tracing, wanted

ADMIN = ("/admin", "/v1/admin")
"""Paths that need a key of scope `admin`."""
EXPOSED = [
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-llmctl-model",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
]


class Guard:
    """Keys, limits, logs and traces of one server. Opening it reads and opens every file, so mistakes come at once."""

    def __init__(
        self,
        params: SafetyParams,
        metrics: ServerMetrics,
        api_key: str = "",
        warn: Callable[[str], None] = lambda _: None,
        tracing: Tracing | None = None,
    ) -> None:
        self.params, self.metrics, self.warn = params, metrics, warn
        path = home_path(params.keys) if params.keys else None
        self.keys = Keys(path, api_key, warn) if path or api_key else None
        if self.keys is not None and not len(self.keys):
            warn(f"{path} holds no API key yet: nobody may ask")
        quota_file = home_path(params.quota_file) if params.quota_file else None
        self.limiter = RateLimiter(params.limits, Quotas(quota_file, warn=warn))
        self.access = AccessLog(self._log(params.access_log)) if params.access_log else None
        self.requests = RequestLog(self._log(params.log_requests)) if params.log_requests else None
        self.tracing = tracing or (Tracing() if wanted(params.tracing) else None)

    def _log(self, target: str) -> LineLog:
        return LineLog(target, self.params.log_max_bytes, self.params.log_keep, self.warn)

    def protect(self, app: FastAPI) -> None:
        """Put the middleware around an application. The last one added is the first to see a request."""
        params = self.params
        admin = (*ADMIN, "/metrics") if params.protect_metrics else ADMIN
        app.add_middleware(Heads)
        app.add_middleware(Body, limit=params.max_request_bytes, seconds=params.body_timeout)
        app.add_middleware(Admissions, keys=self.keys, limiter=self.limiter, admin=admin)
        app.add_middleware(Origins, hosts=params.hosts, origins=params.cors_origins)
        app.add_middleware(
            Deadlines, total=params.request_timeout, first_token=params.first_token_timeout, write=params.write_timeout
        )
        if params.cors_origins:  # outside the deadlines, so that a page may read what they answer
            app.add_middleware(
                CORSMiddleware,
                allow_origins=params.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # OpenAI's client in a browser sends a dozen of its own; what protects is the key
                expose_headers=EXPOSED,
            )
        app.add_middleware(
            Observed,
            metrics=self.metrics,
            warn=self.warn,
            routes=cache(lambda: _plain_routes(app)),
            access=self.access,
            requests=self.requests,
            tracing=self.tracing,
        )

    def uvicorn(self) -> dict[str, Any]:
        """Settings for `uvicorn.Config`: limits that only the server itself can hold."""
        params = self.params
        return {
            "http": limited_protocol(
                params.header_timeout, params.max_header_bytes, params.max_connections, params.write_timeout
            ),
            "timeout_keep_alive": params.keep_alive,
            "proxy_headers": bool(params.trusted_proxies),
            "forwarded_allow_ips": params.trusted_proxies or None,
            "server_header": False,
        }

    def close(self) -> None:
        """Write what is to be kept, close the files, send the last traces."""
        self.limiter.quotas.save()
        for log in (self.access, self.requests):
            if log is not None:
                log.close()
        if self.tracing is not None:
            self.tracing.close()


def _plain_routes(app: FastAPI) -> frozenset[str]:
    """Paths without parameters: those of the schema, and of pages that are not in it."""
    own = [getattr(route, "path", "{") for route in app.routes]
    return frozenset(path for path in (*app.openapi()["paths"], *own) if "{" not in path)
