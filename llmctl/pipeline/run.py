"""Run a pipeline: cached stages are taken, others executed in order, gates checked, every step told as an event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from llmctl.launch.signals import Stop
from llmctl.pipeline.result import RunResult
from llmctl.spec.resolved import Pipeline
from llmctl.store import Store

Event = dict[str, Any]


def run_pipeline(
    pipeline: Pipeline,
    store: Store,
    *,
    to: Sequence[str] = (),
    until: str | None = None,
    on_busy: Literal["wait", "fail", "run"] = "wait",
    gates: Literal["stop", "warn"] = "stop",
    refresh: bool = False,
    emit: Callable[[Event], None] | None = None,
    stop: Stop | None = None,
    tick: Callable[[], None] | None = None,
) -> RunResult:
    """Run the selected stages and return what became of each; never raises for a stage that failed.

    `to` selects those stages and what they need, effects included; without it all stages but effects run, up to and
    without the dependants of `until`. `tick` is called at least every half second while a stage runs.
    Raises InputError (an input is missing, before anything runs), UsageError (no such stage), StageError (disk full).
    """
    raise NotImplementedError
