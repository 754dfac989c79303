"""How long stages took before, and from that how long a run will still take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llmctl.spec.resolved import Pipeline, StageSpec
from llmctl.store import Store
from llmctl.store.commit import replace_json
from llmctl.store.names import read_json


class Durations:
    """Seconds of the last run of each stage, by pipeline and stage id, and of each kind of stage as a fallback."""

    def __init__(self, store: Store, pipeline: Pipeline) -> None:
        self._store = store
        self._pipeline = pipeline.name
        self._seconds = {name: float(s) for name, s in read_json(store.durations).items() if isinstance(s, int | float)}

    def expected(self, spec: StageSpec) -> float | None:
        """Seconds that the stage took last, None if nothing like it ever ran."""
        return self._seconds.get(f"{self._pipeline}/{spec.id}", self._seconds.get(spec.stage.name))

    def remember(self, spec: StageSpec, seconds: float) -> None:
        """Note how long a stage has just taken; of two runs at a time the last one wins."""
        latest = {f"{self._pipeline}/{spec.id}": round(seconds, 3), spec.stage.name: round(seconds, 3)}
        self._seconds |= latest
        replace_json(self._store, self._store.durations, {**read_json(self._store.durations), **latest})


class RunProgress:
    """The share of the run that is done, in expected seconds; a stage of unknown length counts like the average.

    Running stages report from threads of their own.
    """

    def __init__(
        self,
        specs: Sequence[StageSpec],
        cached: Collection[str],
        durations: Durations,
        jobs: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._jobs = jobs
        self._lock = threading.Lock()
        self._done: set[str] = set()
        self._known = {spec.id: 0.0 if spec.id in cached else durations.expected(spec) for spec in specs}
        self._needs = {spec.id: [id for id in spec.dependencies if id in self._known] for spec in specs}
        self._begun: dict[str, float] = {}
        """When each running stage began."""
        self._fractions: dict[str, float] = {}

    def start(self, stage: str) -> None:
        """A stage begins."""
        with self._lock:
            self._begun[stage], self._fractions[stage] = self._clock(), 0.0

    def step(self, stage: str, event: Mapping[str, Any]) -> None:
        """A running stage says how far it is."""
        step, total = event.get("step"), event.get("total")
        if isinstance(step, int | float) and total:
            with self._lock:
                self._fractions[stage] = min(1.0, step / total)

    def end(self, stage: str, seconds: float) -> None:
        """A stage is over: done, cached, failed or skipped."""
        with self._lock:
            self._done.add(stage)
            self._known[stage] = seconds
            self._begun.pop(stage, None)

    def fields(self) -> dict[str, Any]:
        """`done` and `total` stages, and `eta_s`, None while nothing is known about the rest."""
        with self._lock:
            eta = self._remaining()
            done = len(self._done)
        return {"done": done, "total": len(self._known), "eta_s": None if eta is None else round(eta, 1)}

    def _remaining(self) -> float | None:
        """The work that is left, shared by the jobs, but no less than its longest chain: that cannot be shared."""
        known = [seconds for seconds in self._known.values() if seconds]
        average = sum(known) / len(known) if known else None
        left = longest = 0.0
        ends: dict[str, float] = {}
        for stage, expected in self._known.items():
            if stage in self._done:
                continue
            seconds = self._rest(stage, expected) if stage in self._begun else expected
            seconds = average if seconds is None else seconds
            if seconds is None:
                return None
            left += seconds
            ends[stage] = seconds + max((ends.get(before, 0.0) for before in self._needs[stage]), default=0.0)
            longest = max(longest, ends[stage])
        return max(longest, left / self._jobs)

    def _rest(self, stage: str, expected: float | None) -> float | None:
        """Seconds left in a running stage: by its own pace once a tenth is done, else by its last run."""
        passed, fraction = self._clock() - self._begun[stage], self._fractions[stage]
        if fraction >= 0.1:
            return passed / fraction * (1 - fraction)
        return None if expected is None else max(0.0, expected - passed)
