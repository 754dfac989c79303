"""Gates: is a stage's number good enough to go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from llmctl.pipeline.result import GateResult
from llmctl.spec.resolved import Gate, StageRef, StageSpec
from llmctl.stage import Artifact
from llmctl.store.names import read_json

FEW = 12
RELATIVE: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "max_drop": (">=", lambda base, drop: base - drop),
    "max_rise": ("<=", lambda base, rise: base + rise),
    "min_ratio": (">=", lambda base, ratio: base * ratio),
    "max_ratio": ("<=", lambda base, ratio: base * ratio),
}
"""How a limit follows from the baseline's number."""


def read_metrics(outputs: Mapping[str, Artifact], reported: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The final numbers of a stage: its `metrics` output, else what it reported."""
    for artifact in outputs.values():
        if artifact.type == "metrics":
            return read_json(artifact / "metrics.json")
    return dict(reported or {})


def check_gates(
    spec: StageSpec,
    metrics: Mapping[str, Any],
    baseline: Callable[[StageRef], Mapping[str, Any]],
    *,
    warn: bool = False,
) -> tuple[GateResult, ...]:
    """One result per limit of every gate. `baseline` gives the metrics of a gate's baseline; `warn` stops nothing."""
    return tuple(
        _compare(spec.id, gate, metrics, limit, relation, source, warn)
        for gate in spec.gates
        for limit, relation, source in _limits(gate, baseline)
    )


def _limits(gate: Gate, baseline: Callable[[StageRef], Mapping[str, Any]]) -> list[tuple[float | None, str, str]]:
    """(limit, relation, where it comes from) of a gate; the limit is None where the baseline lacks the metric."""
    found: list[tuple[float | None, str, str]] = []
    if gate.min is not None:
        found.append((gate.min, ">=", ""))
    if gate.max is not None:
        found.append((gate.max, "<=", ""))
    if gate.baseline is not None:
        values = baseline(gate.baseline)
        base = number(values.get(gate.metric))
        source = f"{gate.baseline}" if base is not None else f"{gate.baseline}; {available(values)}"
        for name, (relation, limit_of) in RELATIVE.items():
            given = getattr(gate, name)
            if given is not None:
                found.append((None if base is None else limit_of(base, given), relation, source))
    return found


def _compare(
    stage: str, gate: Gate, metrics: Mapping[str, Any], limit: float | None, relation: Any, source: str, warn: bool
) -> GateResult:
    value = number(metrics.get(gate.metric))
    if value is None:
        ok, text = False, f"`{stage}` reports no number `{gate.metric}`; {available(metrics)}"
    elif limit is None:
        ok, text = False, f"the baseline of `{stage}` has no number `{gate.metric}`: {source}"
    else:
        ok = value >= limit if relation == ">=" else value <= limit
        behind = f" ({source} allows)" if source else ""
        text = f"`{stage}`: {gate.metric} is {value:.6g}, must be {relation} {limit:.6g}{behind}"
    return GateResult(
        stage=stage,
        metric=gate.metric,
        value=value,
        limit=limit,
        relation=relation,
        ok=ok,
        on_fail="warn" if warn else gate.on_fail,
        message=text,
    )


def number(value: Any) -> float | None:
    """A finite number; truth values count as 1 and 0, anything else as missing."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def available(metrics: Mapping[str, Any]) -> str:
    """`it has accuracy, loss`: which numbers there are, for a message about one that is not."""
    names = sorted(name for name, value in metrics.items() if number(value) is not None)
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return f"it has {', '.join(names[:FEW])}{more}" if names else "it has no numbers at all"
