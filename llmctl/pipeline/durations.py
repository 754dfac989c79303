"""How long stages took before, and from that how long a run will still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
    """The share of the run that is done, in expected seconds; a stage of unknown length counts like the average."""

    def __init__(
        self,
        specs: Sequence[StageSpec],
        cached: set[str],
        durations: Durations,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._total = len(specs)
        self._done: set[str] = set()
        self._known = {spec.id: 0.0 if spec.id in cached else durations.expected(spec) for spec in specs}
        self._current = ""
        self._begun = clock()
        self._fraction = 0.0

    def start(self, stage: str) -> None:
        """A stage begins."""
        self._current, self._begun, self._fraction = stage, self._clock(), 0.0

    def step(self, event: Mapping[str, Any]) -> None:
        """The running stage says how far it is."""
        step, total = event.get("step"), event.get("total")
        if isinstance(step, int | float) and total:
            self._fraction = min(1.0, step / total)

    def end(self, stage: str, seconds: float) -> None:
        """A stage is over: done, cached, failed or skipped."""
        self._done.add(stage)
        self._known[stage] = seconds
        self._current = ""

    def fields(self) -> dict[str, Any]:
        """`done` and `total` stages, and `eta_s`, None while nothing is known about the rest."""
        eta = self._remaining()
        return {"done": len(self._done), "total": self._total, "eta_s": None if eta is None else round(eta, 1)}

    def _remaining(self) -> float | None:
        known = [seconds for seconds in self._known.values() if seconds]
        average = sum(known) / len(known) if known else None
        left = 0.0
        for stage, expected in self._known.items():
            if stage in self._done:
                continue
            seconds = self._rest(expected) if stage == self._current else expected
            seconds = average if seconds is None else seconds
            if seconds is None:
                return None
            left += seconds
        return left

    def _rest(self, expected: float | None) -> float | None:
        """Seconds left in the running stage: by its own pace once a tenth is done, else by its last run."""
        passed = self._clock() - self._begun
        if self._fraction >= 0.1:
            return passed / self._fraction * (1 - self._fraction)
        return None if expected is None else max(0.0, expected - passed)
