"""What the server counts, in Prometheus' text format, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ServerMetrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("llmctl_requests", "Answered requests.", ["path", "status"], registry=registry)
        self.cancelled = Counter("llmctl_cancelled", "Answers given up because the client left.", registry=registry)
        self.prompt_tokens = Counter("llmctl_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.new_tokens = Counter("llmctl_completion_tokens", "Tokens generated.", registry=registry)
        self.queue_depth = Gauge("llmctl_queue_depth", "Requests that wait.", registry=registry)
        self.running = Gauge("llmctl_running", "Requests that are being answered.", registry=registry)
        self.first_token = Histogram(
            "llmctl_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "llmctl_inter_token_seconds", "Between two tokens.", buckets=TOKEN_SECONDS, registry=registry
        )
        self.duration = Histogram(
            "llmctl_request_seconds", "Whole requests.", ["path"], buckets=SECONDS, registry=registry
        )

    def observe(self, tokens: int, seconds: float, first: bool) -> None:
        """Count a delta of `tokens` that came `seconds` after the one before (or after the request)."""
        self.new_tokens.inc(tokens)
        if first:
            self.first_token.observe(seconds)
        elif tokens:
            for _ in range(tokens):
                self.inter_token.observe(seconds / tokens)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
