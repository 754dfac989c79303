"""One run as a command does it: signals, the reporter on stderr, the copy of the events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from llmctl.console import open_reporter
from llmctl.launch.signals import Stop, signals_stop
from llmctl.pipeline.events import Event, EventCopy
from llmctl.pipeline.result import RunResult
from llmctl.pipeline.run import run_pipeline
from llmctl.spec.resolved import Pipeline
from llmctl.store import Store


def run_session(
    pipeline: Pipeline,
    store: Store,
    *,
    events: str | None = None,
    log_format: str = "text",
    watch: Callable[[Stop], None] | None = None,
    **options: Any,
) -> RunResult:
    """`run_pipeline(pipeline, store, **options)` with signal handlers, `open_reporter()` and `--events FILE|fd:N`.

    `watch` is called about four times a second while a stage runs; it may call `stop.request(code)`
    (`--stop-on-reader-exit` gives 141). The caller raises `result.error()` if it is not None.
    """
    with contextlib.ExitStack() as stack:
        copy = stack.enter_context(contextlib.closing(EventCopy(events))) if events else None
        reporter = stack.enter_context(open_reporter(log_format=log_format))
        stop = stack.enter_context(signals_stop())

        def emit(event: Event) -> str | None:
            reporter.event(event)
            return copy.write(event) if copy is not None else None

        tick = None if watch is None else lambda: watch(stop)
        return run_pipeline(pipeline, store, emit=emit, stop=stop, tick=tick, **options)
