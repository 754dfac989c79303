"""What follows a stage's result, in one thread and in the order of the pipeline's wires: gates, names, exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from llmctl.errors import InputError
from llmctl.launch.failures import FULL, no_space
from llmctl.pipeline.events import EventLog
from llmctl.pipeline.exports import export, export_targets
from llmctl.pipeline.gates import check_gates, read_metrics
from llmctl.pipeline.result import StageResult
from llmctl.spec.resolved import Pipeline, StageRef, StageSpec
from llmctl.stage import Artifact
from llmctl.store import Store, names


class Settlement:
    """Settles the stages of one run; `outputs` are those of the stages that are done, for their dependants."""

    def __init__(self, pipeline: Pipeline, store: Store, events: EventLog, gates: Literal["stop", "warn"]) -> None:
        self._pipeline = pipeline
        self._store = store
        self._events = events
        self._warns = gates == "warn"
        self.outputs: dict[str, Mapping[str, Artifact]] = {}

    def settle(self, spec: StageSpec, result: StageResult) -> str:
        """Check the gates of a finished stage; name and copy its result only if none of them stops.

        Returns why its dependants cannot run, `gate` or `failed`, empty if they can.
        """
        result.metrics = read_metrics(result.outputs, result.metrics)
        headline = (result.choice.metric,) if result.choice else spec.stage.headline
        result.headline = {name: result.metrics[name] for name in headline if name in result.metrics}
        result.gates = check_gates(spec, result.metrics, self._baseline, warn=self._warns)
        for gate in result.gates:
            self._events("gate", **asdict(gate))
            if not gate.ok and gate.on_fail == "warn":
                self._events("warning", stage=spec.id, text=f"gate missed: {gate.message}")
        stopped = any(not gate.ok and gate.on_fail == "stop" for gate in result.gates)
        ids = {port: (artifact.id, artifact.type) for port, artifact in result.outputs.items()}
        tag = "" if stopped else spec.tag
        names.write(self._store, self._pipeline.name, spec.id, ids, key=result.key, run=self._events.run, tag=tag)
        if stopped:
            return "gate"
        return self._export(spec, result)

    def _export(self, spec: StageSpec, result: StageResult) -> str:
        for port, target in export_targets(spec).items():
            if port not in result.outputs:
                continue  # collected; its copy was made when it was there
            try:
                if export(result.outputs[port], target):
                    self._events("log", stage=spec.id, text=f"copied {port} to {target}")
            except (OSError, InputError) as error:
                failure = no_space(target) if isinstance(error, OSError) and error.errno in FULL else None
                result.status, result.code = "failed", 3
                result.message = failure.message if failure else f"cannot copy {port} to {target}: {error}"
                own = error.hint if isinstance(error, InputError) else ""
                result.hint = failure.hint if failure else own or "the result is in the store: llmctl get"
                return "failed"
        return ""

    def _baseline(self, ref: StageRef) -> Mapping[str, Any]:
        artifact = self.outputs[ref.stage][ref.port]
        return read_metrics({ref.port: artifact})
