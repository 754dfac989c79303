"""Which stages a run is about."""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.errors import UsageError
from llmctl.spec.resolved import Pipeline, StageSpec


def select(pipeline: Pipeline, to: Sequence[str] = (), until: str | None = None) -> list[StageSpec]:
    """The selected stages in order.

    `to`: these stages and all that they need, effects included. Without it: every stage that is no effect, and a single
    stage always. `until` leaves out what comes after that stage. UsageError names an unknown stage.
    """
    for name in (*to, *([until] if until else [])):
        if name not in pipeline.stages:
            raise UsageError(f"there is no stage `{name}` in `{pipeline.name}`", hint=_hint(pipeline, name))
    chosen = set(to) or {id for id, spec in pipeline.stages.items() if pipeline.single or not spec.stage.effect}
    if until:
        after = _after(pipeline, until)
        if lost := sorted(set(to) & after):
            raise UsageError(f"`{lost[0]}` comes after `{until}`", hint="give either --to or --until")
        chosen -= after
    for id in reversed(list(pipeline.stages)):
        if id in chosen:
            chosen |= set(pipeline.stages[id].dependencies)
    return [spec for id, spec in pipeline.stages.items() if id in chosen]


def _after(pipeline: Pipeline, stage: str) -> set[str]:
    """All stages that depend on `stage`."""
    found: set[str] = set()
    for id, spec in pipeline.stages.items():
        if (found | {stage}) & set(spec.dependencies):
            found.add(id)
    return found


def _hint(pipeline: Pipeline, name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, pipeline.stages, 1)
    return f"did you mean `{near[0]}`?" if near else f"its stages: {', '.join(pipeline.stages)}"
