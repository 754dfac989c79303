"""Which stages a run is about."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llmctl.errors import UsageError
from llmctl.spec.resolved import Pipeline, StageSpec


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The selected stages in order; `given` are those before `--from`, whose results must be in the store already."""

    specs: tuple[StageSpec, ...]
    given: frozenset[str] = frozenset()
    start: str = ""


def select(pipeline: Pipeline, to: Sequence[str] = (), until: str | None = None, start: str | None = None) -> Selection:
    """The stages of a run. Every name is a stage, which means all its instances, or one instance.

    `to`: these stages and all that they need, effects included. Without it: every stage that neither is an effect nor
    needs one, and a single stage always. `until` leaves out what comes after that stage, `start` what neither is that
    stage nor depends on it; what those that are left need besides is `given`. UsageError names an unknown stage, an
    effect that only `to` may name, and names that exclude another or leave nothing.
    """
    wanted = {id for name in to for id in instances(pipeline, name)}
    effects = {id for id, spec in pipeline.stages.items() if spec.stage.effect}
    chosen = wanted or set(pipeline.stages) - (set() if pipeline.single else effects | _after(pipeline, effects))
    if not chosen:
        hint = f"name one: --to {next(iter(pipeline.stages))}"
        raise UsageError(f"all stages of `{pipeline.name}` act on the world", hint=hint)
    needed = _with_needs(pipeline, chosen)
    begun = set(pipeline.stages)
    if start is not None:
        first = _named(pipeline, "--from", start, needed)
        begun = first | _after(pipeline, first)
        if lost := sorted(wanted - begun):
            raise UsageError(f"`{lost[0]}` does not depend on `{start}`", hint="give either --to or --from")
        chosen = wanted or first | chosen & begun
    if until is not None:
        last = _named(pipeline, "--until", until, needed)
        after = _after(pipeline, last) - last
        if lost := sorted(wanted & after):
            raise UsageError(f"`{lost[0]}` comes after `{until}`", hint="give either --to or --until")
        chosen -= after
        if not chosen:
            raise UsageError(f"`{start}` comes after `{until}`: nothing is left to run", hint="exchange them")
    chosen = _with_needs(pipeline, chosen)
    specs = tuple(spec for id, spec in pipeline.stages.items() if id in chosen)
    return Selection(specs=specs, given=frozenset(chosen - begun), start=start or "")


def _named(pipeline: Pipeline, option: str, name: str, needed: Collection[str]) -> set[str]:
    """The instances that an option names. UsageError for an effect that is not among what is `needed` for `--to`."""
    if not name:
        raise UsageError(f"{option} is empty", hint=f"name a stage of `{pipeline.name}`, or leave {option} out")
    found = set(instances(pipeline, name))
    if any(pipeline.stages[id].stage.effect and id not in needed for id in found):
        raise UsageError(f"`{name}` acts on the world: {option} does not run it", hint=f"--to {name} does")
    return found


def _with_needs(pipeline: Pipeline, stages: Iterable[str]) -> set[str]:
    """These stages and all that they depend on."""
    found = set(stages)
    for id in reversed(list(pipeline.stages)):
        if id in found:
            found |= set(pipeline.stages[id].dependencies)
    return found


def instances(pipeline: Pipeline, name: str) -> list[str]:
    """The instance ids that a name means: itself, or all rows of a matrix; UsageError if there is none."""
    if name in pipeline.stages:
        return [name]
    if found := [id for id, spec in pipeline.stages.items() if spec.base == name]:
        return found
    raise UsageError(f"there is no stage `{name}` in `{pipeline.name}`", hint=_hint(pipeline, name))


def _after(pipeline: Pipeline, stages: Iterable[str]) -> set[str]:
    """All stages that depend on one of `stages`."""
    behind, found = set(stages), set()
    for id, spec in pipeline.stages.items():
        if not behind.isdisjoint(spec.dependencies):
            behind.add(id)
            found.add(id)
    return found


def _hint(pipeline: Pipeline, name: str) -> str:
    from difflib import get_close_matches

    bases = list(dict.fromkeys(spec.base or id for id, spec in pipeline.stages.items()))
    near = get_close_matches(name, pipeline.stages if "[" in name else bases, 1)
    return f"did you mean `{near[0]}`?" if near else f"its stages: {', '.join(bases)}"
