"""OpenTelemetry spans, one tree per request: the request, its time in the queue, prefill, decode.

The tree is written when the request has ended, from the times that its `Exchange` holds, so tokens cost nothing.
Attributes follow the semantic conventions for generative AI and for HTTP. The SDK is imported only when tracing is on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from llmctl import StageError, UsageError, __version__
from llmctl_serve.exchange import Exchange

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

PREFIX = "OTEL_EXPORTER_OTLP"
SETTINGS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "stop": "gen_ai.request.stop_sequences",
    "n": "gen_ai.request.choice.count",
}
"""Names of sampling settings, where the conventions have one."""


class Tracing:
    """Writes spans with one provider. `provider` is for tests and for programs that have their own."""

    def __init__(self, provider: TracerProvider | None = None, endpoint: str | None = None) -> None:
        self._provider = _provider(endpoint) if provider is None else provider
        self._tracer = self._provider.get_tracer("llmctl.serve", __version__)

    def begin(self, exchange: Exchange) -> Any:
        """The request's span, a child of the client's `traceparent`; the answer will carry its own."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        context = propagator.extract({"traceparent": exchange.traceparent} if exchange.traceparent else {})
        span = self._tracer.start_span(
            exchange.method, context, kind=SpanKind.SERVER, start_time=round(exchange.wall * 1e9)
        )
        found = span.get_span_context()
        own = f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"
        exchange.headers = {**exchange.headers, "traceparent": own}
        return span

    def end(self, span: Any, exchange: Exchange) -> None:
        """Close the request's span, and write those of its parts."""
        from opentelemetry import trace

        if span.is_recording():
            self._describe(span, exchange)
            context = trace.set_span_in_context(span)
            for name, start, end in _phases(exchange):
                part = self._tracer.start_span(name, context, start_time=_unix(exchange, start))
                part.end(_unix(exchange, end))
        span.end(_unix(exchange, exchange.ended_at or exchange.began))

    def _describe(self, span: Any, exchange: Exchange) -> None:
        from opentelemetry.trace import Status, StatusCode

        attributes: dict[str, Any] = {
            "http.request.method": exchange.method,
            "http.route": exchange.route,
            "http.response.status_code": exchange.status,
            "client.address": exchange.client,
            "llmctl.request_id": exchange.request_id,
        }
        span.update_name(f"{exchange.method} {exchange.route}")
        if exchange.asked_at is not None:
            span.update_name(f"{exchange.operation or exchange.route} {exchange.model}")
            attributes |= {
                "gen_ai.operation.name": exchange.operation,
                "gen_ai.provider.name": "llmctl",
                "gen_ai.request.model": exchange.model,
                "gen_ai.response.model": exchange.model,
                "gen_ai.usage.input_tokens": exchange.prompt_tokens,
                "gen_ai.usage.output_tokens": exchange.generated,
                "gen_ai.usage.cache_read.input_tokens": exchange.cached,
                "gen_ai.response.finish_reasons": [reason for _, reason in sorted(exchange.finish_reasons.items())],
                "llmctl.artifact": exchange.artifact,
            }
            asked = {SETTINGS[name]: value for name, value in exchange.settings.items() if name in SETTINGS}
            attributes |= {name: value for name, value in asked.items() if value is not None}
        failed = exchange.error or exchange.cut
        if failed or exchange.status >= 400:
            attributes["error.type"] = failed or str(exchange.status)
        if exchange.status >= 500 or exchange.cut or (failed and exchange.status < 400):
            span.set_status(Status(StatusCode.ERROR))
        span.set_attributes(attributes)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _phases(exchange: Exchange) -> list[tuple[str, float, float]]:
    """Name, beginning and end of the parts that there were."""
    phases = []
    end = exchange.ended_at or exchange.began
    if exchange.asked_at is not None:
        phases.append(("queue", exchange.asked_at, exchange.admitted_at or end))
    if exchange.admitted_at is not None:
        phases.append(("prefill", exchange.admitted_at, exchange.first_at or end))
    if exchange.first_at is not None and exchange.last_at is not None:
        phases.append(("decode", exchange.first_at, exchange.last_at))
    return phases


def _unix(exchange: Exchange, at: float) -> int:
    """Unix nanoseconds of a `perf_counter` time."""
    return round((exchange.wall + (at - exchange.began)) * 1e9)


def wanted(parameter: bool | None) -> bool:
    """Whether to trace: as the parameter says, else where the environment names a collector."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    there = bool(os.environ.get(f"{PREFIX}_ENDPOINT") or os.environ.get(f"{PREFIX}_TRACES_ENDPOINT"))
    return there if parameter is None else parameter


def _provider(endpoint: str | None) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StageError(
            "traces need OpenTelemetry's SDK", hint="pip install 'llmctl[otel]', or set tracing: false"
        ) from error
    protocol = os.environ.get(f"{PREFIX}_TRACES_PROTOCOL") or os.environ.get(f"{PREFIX}_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        raise UsageError(
            f"traces are sent over http/protobuf, the environment asks for `{protocol}`",
            hint=f"unset {PREFIX}_PROTOCOL and use the collector's HTTP port, 4318 as a rule",
        )
    name = os.environ.get("OTEL_SERVICE_NAME", "llmctl-serve")
    resource = Resource.create({"service.name": name, "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider
