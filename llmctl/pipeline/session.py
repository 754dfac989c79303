"""One run as a command does it: signals, the reporter on stderr, the copy of the events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmctl.launch.signals import Stop
from llmctl.pipeline.result import RunResult
from llmctl.spec.resolved import Pipeline
from llmctl.store import Store


def run_session(
    pipeline: Pipeline,
    store: Store,
    *,
    events: str | None = None,
    watch: Callable[[Stop], None] | None = None,
    **options: Any,
) -> RunResult:
    """`run_pipeline(pipeline, store, **options)` with signal handlers, `open_reporter()` and `--events FILE|fd:N`.

    `watch` is called about twice a second while a stage runs; it may call `stop.request(code)` (`--stop-on-reader-exit`
    gives 141). The caller raises `result.error()` if it is not None.
    """
    raise NotImplementedError
