"""The end of a run for a person: stage, key number, time, artifact."""

from __future__ import annotations

from llmctl.console import human_number, human_seconds, table
from llmctl.pipeline.result import RunResult, StageResult

SHORT = 15
"""Characters of an id: `sha256:` and eight digits, enough to be typed."""


def summary(result: RunResult) -> str:
    """A table with one row per stage, and one line per gate that was missed."""
    rows = [(stage.id, _number(stage), _time(stage), _artifact(stage)) for stage in result.stages.values()]
    lines = [table(("STAGE", "RESULT", "TIME", "ARTIFACT"), rows)]
    gates = [gate for stage in result.stages.values() for gate in stage.gates]
    if gates:
        passed = sum(gate.ok for gate in gates)
        lines.append(f"gates: {passed} of {len(gates)} passed")
        lines += [f"  missed: {gate.message}" for gate in gates if not gate.ok]
    return "\n".join(lines)


def _number(stage: StageResult) -> str:
    if stage.status == "skipped":
        return f"skipped: {stage.message}"
    if not stage.ok:
        return stage.status
    if stage.choice is not None:
        choice = stage.choice
        values = "".join(f"  {name} {value}" for name, value in choice.values.items())
        return f"chose {choice.stage}{values}  {choice.metric} {human_number(choice.value)}"
    return "  ".join(f"{name} {human_number(value)}" for name, value in stage.headline.items()) or "-"


def _time(stage: StageResult) -> str:
    if stage.choice is not None:
        return "-"
    attempts = f", {stage.attempts} attempts" if stage.attempts > 1 else ""
    return human_seconds(stage.seconds) + attempts if stage.status in ("done", "failed", "stopped") else stage.status


def _artifact(stage: StageResult) -> str:
    """The id of the first output that is no metrics, and how many more there are; `collected` if it is gone."""
    if stage.collected:
        return "collected"
    ids = [artifact.id for artifact in stage.outputs.values() if artifact.type != "metrics"]
    ids = ids or [artifact.id for artifact in stage.outputs.values()]
    more = f" +{len(ids) - 1}" if len(ids) > 1 else ""
    return ids[0][:SHORT] + more if ids else "-"
