"""The access log, one JSON line per request, and the request log, which alone holds prompts and answers."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from llmctl_serve.exchange import Exchange
from llmctl_serve.files import LineLog

LONGEST = 256
"""Characters of what a client chose (path, model) in a line."""


class AccessLog:
    """Who asked what kind of thing, and how it went; never what was said."""

    def __init__(self, log: LineLog) -> None:
        self._log = log

    def write(self, exchange: Exchange) -> None:
        """Add the line of a request that has ended."""
        self._log.write(access_line(exchange))

    def close(self) -> None:
        """Close the file."""
        self._log.close()


def access_line(exchange: Exchange) -> dict[str, Any]:
    """The fields of a line; what does not apply is null, so that every line has the same ones."""
    reasons = sorted(set(exchange.finish_reasons.values()))
    return {
        "time": _time(exchange.wall),
        "request_id": exchange.request_id,
        "key": exchange.key_id or None,
        "client": exchange.client or None,
        "method": exchange.method[:LONGEST],
        "route": exchange.route,
        "path": exchange.path[:LONGEST] if exchange.route == "other" else exchange.route,
        "model": exchange.model[:LONGEST] or None,
        "artifact": exchange.artifact or None,
        "status": exchange.status,
        "stream": exchange.stream,
        "prompt_tokens": exchange.prompt_tokens,
        "generated_tokens": exchange.generated,
        "cached_tokens": exchange.cached,
        "queue_ms": _ms(exchange.queue_seconds),
        "first_token_ms": _ms(exchange.first_token_seconds),
        "masking_ms": _ms(exchange.masking_seconds),
        "total_ms": _ms(exchange.seconds),
        "finish_reason": ",".join(reasons) or None,
        "error": exchange.error or None,
        "cut": exchange.cut or None,
    }


class RequestLog:
    """What was asked and answered, word for word: for tracing one reply back, for monitoring, for new data."""

    def __init__(self, log: LineLog) -> None:
        self._log = log

    def write(self, exchange: Exchange) -> None:
        """Add the line of a request that a model has answered or begun to answer; others say nothing of a model."""
        if not exchange.prompts:
            return
        self._log.write(
            {
                "time": _time(exchange.wall),
                "request_id": exchange.request_id,
                "key": exchange.key_id or None,
                "model": exchange.model,
                "artifact": exchange.artifact or None,
                "operation": exchange.operation,
                "settings": dict(exchange.settings),
                "prompts": exchange.prompts,
                "answers": [
                    {
                        "index": index,
                        **exchange.answers.get(index, {"answer": None}),
                        "finish_reason": exchange.finish_reasons.get(index),
                    }
                    for index in sorted({*exchange.finish_reasons, *exchange.answers})
                ],
                "prompt_tokens": exchange.prompt_tokens,
                "generated_tokens": exchange.generated,
                "status": exchange.status,
                "error": exchange.error or None,
                "cut": exchange.cut or None,
            }
        )

    def close(self) -> None:
        """Close the file."""
        self._log.close()


def _time(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1000, 3)
