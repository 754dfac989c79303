"""What the server counts, in Prometheus' text format, in a registry of its own.

Labels hold what the server chose, never what a client did: routes that exist, models that are served. Figures of a
request are counted when it has ended, from its `Exchange`; those of an engine are read from its `EngineStats` when
somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmctl import __version__
from llmctl.engine import EngineStats
from llmctl_serve.exchange import Exchange

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 30, 60)
"""Dense where people begin to notice (0.2 to 1 s)."""
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
"""Dense between a fast accelerator and the speed of reading."""
MASKING_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
"""From a mask that lay ready to a grammar that costs more than the model."""
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NONE = "none"
"""The label of a request that reached no model."""

REFUSALS = (401, 403, 408, 413, 421, 429, 431, 503)
REASONS = frozenset(
    (
        "invalid_api_key",
        "missing_scope",
        "engine_failed",
        "host_not_allowed",
        "origin_not_allowed",
        "body_too_large",
        "headers_too_large",
        "timeout",
        "first_token_timeout",
        "queue_full",
        "shutting_down",
        *(f"rate_limit_{why}" for why in ("requests", "tokens", "concurrency", "requests_per_day", "tokens_per_day")),
    )
)
"""What `reason` may be; anything else is `other`."""

GAUGES = {
    "waiting": ("llmctl_queue_depth", "Requests that wait for the engine."),
    "running": ("llmctl_running", "Answers that advance with every step: the size of the batch."),
    "slots": ("llmctl_slots", "Most answers side by side."),
    "cache_used": ("llmctl_cache_used_tokens", "Tokens whose keys and values are held."),
    "cache_capacity": ("llmctl_cache_capacity_tokens", "Tokens whose keys and values can be held."),
}
COUNTERS = {
    "steps": ("llmctl_engine_steps", "Steps of the engine."),
    "prompt_tokens": ("llmctl_engine_prompt_tokens", "Tokens of prompts that the engine was given."),
    "generated_tokens": (
        "llmctl_engine_generated_tokens",
        "Tokens that the engine generated, cancelled ones included.",
    ),
    "cached_tokens": ("llmctl_prefix_cache_hit_tokens", "Tokens of prompts that the prefix cache saved."),
    "evictions": ("llmctl_cache_evictions", "Sequences that were driven out of the cache."),
    "drafted": ("llmctl_speculation_drafted_tokens", "Tokens that speculation proposed."),
    "accepted": ("llmctl_speculation_accepted_tokens", "Proposed tokens that the model confirmed."),
}


class EngineCollector(Collector):
    """Reads the engines' own counts at every scrape."""

    def __init__(self) -> None:
        self._sources: dict[str, tuple[Callable[[], EngineStats], float]] = {}
        self._info: dict[str, dict[str, str]] = {}

    def watch(self, model: str, stats: Callable[[], EngineStats], bytes_per_token: float, info: dict[str, str]) -> None:
        """Read this engine from now on, in place of an earlier one of that name."""
        self._sources[model], self._info[model] = (stats, bytes_per_token), info

    def forget(self, model: str) -> None:
        """It is no longer served."""
        self._sources.pop(model, None)
        self._info.pop(model, None)

    def collect(self) -> Iterator[Metric]:  # noqa: D102  # prometheus_client's
        found = {model: (stats(), size) for model, (stats, size) in list(self._sources.items())}
        for name, (metric, text) in GAUGES.items():
            gauge = GaugeMetricFamily(metric, text, labels=["model"])
            for model, (stats, _) in found.items():
                gauge.add_metric([model], getattr(stats, name))
            yield gauge
        for name, (metric, text) in COUNTERS.items():
            counter = CounterMetricFamily(metric, text, labels=["model"])
            for model, (stats, _) in found.items():
                counter.add_metric([model], getattr(stats, name))
            yield counter
        memory = GaugeMetricFamily(
            "llmctl_cache_bytes", "Memory that the cache of keys and values takes.", labels=["model"]
        )
        for model, (stats, size) in found.items():
            if size:
                memory.add_metric([model], stats.cache_capacity * size)
        yield memory
        names = InfoMetricFamily("llmctl_model", "What is served.", labels=["model"])
        for model, info in list(self._info.items()):
            names.add_metric([model], info)
        yield names


class ServerMetrics:
    """The metrics of one server. With `per_key`, tokens are counted by the ids of keys too."""

    def __init__(self, per_key: bool = False) -> None:
        registry = self.registry = CollectorRegistry()
        self.engines = EngineCollector()
        registry.register(self.engines)
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"llmctl_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"llmctl_{name}", text, labels, buckets=buckets, registry=registry)

        build = Gauge("llmctl_build_info", "Always 1; the version is a label.", ["version"], registry=registry)
        build.labels(__version__).set(1)
        self.requests = counter(
            "requests", "Answered requests; 499: the client left before.", "route", "status", "model"
        )
        self.open = Gauge("llmctl_open_requests", "Requests that are being handled.", registry=registry)
        self.rejected = counter("rejected", "Requests that were turned away.", "reason")
        self.cancelled = counter("cancelled", "Answers given up before their end.", "model", "reason")
        self.finished = counter("answers", "Complete answers.", "model", "finish_reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "model")
        self.new_tokens = counter("completion_tokens", "Tokens generated.", "model")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that were in the cache.", "model")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_SECONDS, "model"
        )
        self.inter_token = histogram("inter_token_seconds", "Between two tokens of one answer.", TOKEN_SECONDS, "model")
        self.masking = histogram(
            "masking_seconds",
            "What following the form of an answer (schema, regex, grammar, tools) took, per token.",
            MASKING_SECONDS,
            "model",
        )
        self.queue = histogram(
            "queue_seconds", "From acceptance to the engine's beginning.", FIRST_TOKEN_SECONDS, "model"
        )
        self.prefill = histogram(
            "prefill_seconds", "From the engine's beginning to the first token.", FIRST_TOKEN_SECONDS, "model"
        )
        self.duration = histogram("request_seconds", "Whole requests, to their last byte.", SECONDS, "route", "model")
        self.prompt_sizes = histogram("request_prompt_tokens", "Tokens of one prompt.", TOKENS, "model")
        self.answer_sizes = histogram("request_completion_tokens", "Tokens of one request's answers.", TOKENS, "model")
        self.batch = histogram("batch_size", "Answers that one step advanced.", BATCH, "model")
        self.key_tokens = counter("key_tokens", "Tokens by key.", "key", "kind") if per_key else None

    def watch(
        self,
        model: str,
        stats: Callable[[], EngineStats],
        bytes_per_token: float = 0,
        **info: str,
    ) -> None:
        """Show an engine: its counts, `bytes_per_token` of its cache if known, and `info` such as artifact, backend.

        `stats` is called from the thread of the scrape, so it should give a snapshot that the engine's thread made.
        """
        self.engines.watch(model, stats, bytes_per_token, info)

    def forget(self, model: str) -> None:
        """Stop showing an engine; what was counted of its requests stays."""
        self.engines.forget(model)

    def ended(self, exchange: Exchange) -> None:
        """Count a request that has ended."""
        model = exchange.model or NONE
        self.requests.labels(exchange.route, str(exchange.status), model).inc()
        self.duration.labels(exchange.route, model).observe(exchange.seconds)
        if exchange.status in REFUSALS:
            self.rejected.labels(exchange.error if exchange.error in REASONS else "other").inc()
        if exchange.cut:
            self.cancelled.labels(model, exchange.cut).inc()
        if exchange.asked_at is None:
            return
        self.prompt_tokens.labels(model).inc(exchange.prompt_tokens)
        self.new_tokens.labels(model).inc(exchange.generated)
        self.cached_tokens.labels(model).inc(exchange.cached)
        self.prompt_sizes.labels(model).observe(exchange.prompt_tokens)
        self.answer_sizes.labels(model).observe(exchange.generated)
        for reason in exchange.finish_reasons.values():
            self.finished.labels(model, reason).inc()
        if exchange.queue_seconds is not None:
            self.queue.labels(model).observe(exchange.queue_seconds)
        if exchange.prefill_seconds is not None:
            self.prefill.labels(model).observe(exchange.prefill_seconds)
        if exchange.first_token_seconds is not None:
            self.first_token.labels(model).observe(exchange.first_token_seconds)
        gap = self.inter_token.labels(model)
        for seconds, tokens in exchange.gaps:
            for _ in range(tokens):
                gap.observe(seconds / tokens)
        if exchange.masking is not None:
            masking = self.masking.labels(model)
            for seconds in exchange.masking.steps:
                masking.observe(seconds)
        if self.key_tokens is not None and exchange.key_id:
            self.key_tokens.labels(exchange.key_id, "prompt").inc(exchange.prompt_tokens)
            self.key_tokens.labels(exchange.key_id, "completion").inc(exchange.generated)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
