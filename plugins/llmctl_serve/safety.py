"""Parameters of what protects and observes a server."""

from __future__ import annotations

import ipaddress

from pydantic import model_validator

from llmctl.spec.params import Field, Params
from llmctl_serve.rate_limits import Limits


class SafetyParams(Params):
    """Keys, limits, timeouts, logs, traces."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    insecure: bool = Field(
        default=False, affects="nothing", description="serve other machines without any API key: everybody may ask"
    )
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the key clients must send",
    )
    keys: str | None = Field(
        default=None,
        min_length=1,
        affects="nothing",
        description="file of API keys, made by `llmctl keys`; read again when it changes",
    )
    protect_metrics: bool = Field(
        default=False, affects="nothing", description="with keys: /metrics needs one of scope admin"
    )
    allowed_hosts: list[str] = Field(
        default=[],
        affects="nothing",
        description="names in `Host` that are answered, *.example.org too; default: this machine's on a loopback "
        "address, else any",
    )
    cors_origins: list[str] = Field(
        default=[], affects="nothing", description="origins whose web pages may ask, such as https://example.org"
    )
    trusted_proxies: list[str] = Field(
        default=[], affects="nothing", description="addresses whose X-Forwarded-For names the client"
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, affects="nothing", description="of one key, or of one address where there are no keys"
    )
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        affects="nothing",
        description="likewise; prompt and answer, what an answer leaves is refunded",
    )
    concurrent_requests: int | None = Field(
        default=None, ge=1, affects="nothing", description="likewise: requests at a time"
    )
    requests_per_day: int | None = Field(
        default=None, ge=1, affects="nothing", description="likewise: until midnight UTC"
    )
    tokens_per_day: int | None = Field(
        default=None, ge=1, affects="nothing", description="likewise: until midnight UTC"
    )
    quota_file: str | None = Field(
        default=None, min_length=1, affects="nothing", description="keeps what was used today over restarts"
    )
    max_request_bytes: int = Field(default=1 << 20, ge=1024, description="a larger request body is answered with 413")
    max_header_bytes: int = Field(
        default=1 << 16, ge=1024, affects="nothing", description="a larger head of a request is answered with 431"
    )
    max_connections: int = Field(
        default=512, ge=1, affects="nothing", description="a further connection is answered with 503"
    )
    header_timeout: float = Field(
        default=10.0, gt=0, affects="nothing", description="seconds for the head of a request to arrive"
    )
    body_timeout: float = Field(
        default=30.0, ge=0, affects="nothing", description="seconds for its body; 0: as long as it takes"
    )
    first_token_timeout: float = Field(
        default=120.0, ge=0, affects="nothing", description="seconds until the first token, then 503; 0: no limit"
    )
    request_timeout: float = Field(
        default=600.0, ge=0, affects="nothing", description="seconds for a whole request, then 504; 0: no limit"
    )
    write_timeout: float = Field(
        default=30.0, ge=0, affects="nothing", description="seconds that a client may take nothing; 0: no limit"
    )
    keep_alive: int = Field(default=5, ge=1, affects="nothing", description="seconds that an idle connection is kept")
    access_log: str | None = Field(
        default=None, min_length=1, affects="nothing", description="file for a JSON line per request; - for stderr"
    )
    log_requests: str | None = Field(
        default=None, min_length=1, affects="nothing", description="file for prompts and answers, word for word"
    )
    log_max_bytes: int = Field(
        default=100_000_000, ge=0, affects="nothing", description="size at which a log is rotated; 0: never"
    )
    log_keep: int = Field(default=5, ge=1, affects="nothing", description="rotated files that are kept")
    metrics_per_key: bool = Field(
        default=False, affects="nothing", description="count tokens by the ids of keys in /metrics"
    )
    tracing: bool | None = Field(
        default=None,
        affects="nothing",
        description="OpenTelemetry traces (extra `otel`); default: where OTEL_EXPORTER_OTLP_ENDPOINT is set",
    )

    @property
    def limits(self) -> Limits:
        """What one client may do."""
        return Limits(
            self.requests_per_minute,
            self.tokens_per_minute,
            self.concurrent_requests,
            self.requests_per_day,
            self.tokens_per_day,
        )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")

    @property
    def hosts(self) -> list[str]:
        """Names that `Host` may have; empty for any."""
        if self.allowed_hosts:
            return [] if "*" in self.allowed_hosts else [*self.allowed_hosts, "localhost", self.host]
        return ["localhost", "*.localhost", self.host] if self.loopback else []

    def secrets(self) -> set[str]:
        """The variable of the key."""
        return {self.api_key_env} if self.api_key_env else set()

    @model_validator(mode="after")
    def _safe(self) -> SafetyParams:
        if not self.loopback and not (self.keys or self.api_key_env or self.insecure):
            raise ValueError(
                f"host {self.host} lets other machines in, and there are no API keys: set keys or api_key_env, "
                "or insecure: true if everybody may ask"
            )
        if self.protect_metrics and not (self.keys or self.api_key_env):
            raise ValueError("protect_metrics needs keys or api_key_env")
        if self.access_log and self.access_log == self.log_requests:
            raise ValueError("access_log and log_requests must be two files")
        if self.quota_file and not (self.requests_per_day or self.tokens_per_day or self.keys):
            raise ValueError("quota_file needs requests_per_day, tokens_per_day, or keys that have them")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(f"cors_origins: `{origin}` is no origin, such as https://example.org")
        return self
