"""What a run would do with each stage, and why: compares the key with what the store holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmctl.errors import StageError
from llmctl.pipeline.changes import changes
from llmctl.pipeline.choice import Choice, choose
from llmctl.pipeline.drift import circumstances
from llmctl.pipeline.inputs import Inputs
from llmctl.registry import Origin, Registry
from llmctl.spec.resolved import Pipeline, StageRef, StageSpec
from llmctl.stage import Artifact
from llmctl.store import Store
from llmctl.store.commit import intact
from llmctl.store.keys import Keys, make_keys, static_preimage
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.names import Names
from llmctl.store.store import Pointer

FEW = 3
"""Stages that `needs the result of` names."""
Action = Literal["cached", "run", "unknown", "select"]
Bound = Mapping[str, Sequence[Artifact]]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do with one stage. `unknown` means that it depends on the bytes of an input that is yet to be made,
    `select` that it picks a row of its inputs, for which nothing has to run."""

    id: str
    action: Action
    why: tuple[str, ...] = ()
    keys: Keys | None = None
    """None while inputs are unknown."""
    pointer: Pointer | None = None
    """The cached result."""
    outputs: Mapping[str, Artifact] = field(default_factory=dict)
    """What the stage's dependants get, of a cached result or a choice."""
    collected: bool = False
    """Whether bytes of the cached result are gone (`ephemeral: true`); its ids still make the keys of others."""
    needed_by: str = ""
    """The stage for which collected bytes are made again."""
    choice: Choice | None = None

    @property
    def works(self) -> bool:
        """Whether a process will, or may, be started."""
        return self.action in ("run", "unknown")


class Planner:
    """Decides stage by stage; the runner asks again with real inputs when a stage's turn has come.

    With `strict` the facts of the machine are part of every key.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        store: Store,
        registry: Registry,
        *,
        refresh: bool = False,
        given: Collection[str] = (),
        strict: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.store = store
        self.registry = registry
        self.refresh = refresh
        self.given = given
        self.strict = circumstances() if strict else None
        self._origins: dict[str, Origin] = {}
        self._artifacts: dict[str, Artifact] = {}
        self._names = Names(store)
        self._remade: set[str] = set()
        """Stages whose collected bytes are needed, so that their old result does not count."""

    def plan(self, specs: Sequence[StageSpec], inputs: Inputs) -> list[Decision]:
        """A decision per stage; those of cached stages give the inputs of the later ones."""
        outputs: dict[str, Mapping[str, Artifact]] = {}
        decisions = []
        for spec in specs:
            waits = [stage for stage in sources(spec) if stage not in outputs]
            decision = self.decide(spec, None if waits else inputs.bind(spec, outputs), waits)
            if not decision.works:
                outputs[spec.id] = decision.outputs
            decisions.append(decision)
        decisions = needed_again(specs, decisions)
        self._remade = {decision.id for decision in decisions if decision.needed_by}
        return decisions

    def decide(self, spec: StageSpec, bound: Bound | None, waits: Sequence[str] = ()) -> Decision:
        """What to do with `spec` given its inputs; None if they are not known until the stages `waits` have run."""
        if spec.select is not None:
            return self._choose(spec, bound, waits)
        forced = self.forced(spec)
        if bound is None:
            why = self._changes(spec, lambda: static_preimage(spec, self.origin(spec), self.strict), "new")
            action: Action = "run" if why or forced else "unknown"
            return Decision(id=spec.id, action=action, why=(*forced, *why) or _waiting(waits))
        ids = {port: [artifact.id for artifact in artifacts] for port, artifacts in bound.items()}
        keys = make_keys(spec, self.origin(spec), ids, self.strict)
        if forced:
            return Decision(id=spec.id, action="run", why=forced, keys=keys)
        if self.store.key(keys.action).exists():
            return self._known(spec, keys)
        why = self._changes(spec, lambda: keys.preimage, "new")
        return Decision(id=spec.id, action="run", why=why or ("it was not finished",), keys=keys)

    def _known(self, spec: StageSpec, keys: Keys) -> Decision:
        """What to do with a stage whose key was published: its artifacts may have gone meanwhile."""
        found = self.store.lookup(keys.action)
        pointer = found or self.store.pointer(keys.action)
        counts = found is not None or (spec.ephemeral and spec.id not in self._remade)
        if pointer is None or not counts:
            return Decision(id=spec.id, action="run", why=("its artifact is gone or damaged",), keys=keys)
        outputs, gone = self._outputs(spec, pointer, whole=found is not None), found is None
        return Decision(id=spec.id, action="cached", keys=keys, pointer=pointer, outputs=outputs, collected=gone)

    def origin(self, spec: StageSpec) -> Origin:
        """Where the stage comes from, looked up once."""
        name = spec.stage.name
        if name not in self._origins:
            self._origins[name] = self.registry.origin(name)
        return self._origins[name]

    def latest(self, spec: StageSpec) -> Mapping[str, Any]:
        """What is noted of the latest result under the stage's name (`id`, `key`, `run`); empty if there is none."""
        refs = self._names.of(self.pipeline.name, spec.id).values()
        return max(refs, key=lambda ref: str(ref.get("time", "")), default={})

    def _choose(self, spec: StageSpec, bound: Bound | None, waits: Sequence[str]) -> Decision:
        """A choice as soon as its inputs are there; one that cannot be made is told by the run, as its failure."""
        if bound is None:
            return Decision(id=spec.id, action="unknown", why=_waiting(waits))
        try:
            choice = choose(spec, bound, self.pipeline)
        except StageError as error:
            return Decision(id=spec.id, action="run", why=(error.message,))
        return Decision(id=spec.id, action="select", why=(str(choice),), choice=choice, outputs=choice.outputs)

    def _changes(self, spec: StageSpec, preimage: Callable[[], Mapping[str, Any]], new: str) -> tuple[str, ...]:
        """How a stage differs from its last result; `new` without one. The pre-image is made only to be compared."""
        key = self.latest(spec).get("key")
        last = self.store.pointer(str(key)) if key else None
        return tuple(change.phrase for change in changes(last.preimage, preimage())) if last else (new,)

    def _outputs(self, spec: StageSpec, pointer: Pointer, *, whole: bool) -> dict[str, Artifact]:
        """The artifacts of a published result; of one that was collected only the id is known.

        `whole` if the store has just looked at all their files: a second look is a tenth of the time of a plan.
        """
        return {
            port: self._artifacts.get(id)
            or self._read(id, whole=whole)
            or Artifact(self.store.artifact(id), spec.outputs.get(port, ""), id)
            for port, id in pointer.outputs.items()
        }

    def _read(self, id: str, *, whole: bool) -> Artifact | None:
        directory = self.store.artifact(id)
        try:
            manifest = Manifest.read(directory) if whole else intact(directory)
        except (OSError, BadManifest):  # it went in between
            return None
        if manifest is None:
            return None
        self._artifacts[id] = Artifact(directory, manifest.type, manifest.id, manifest.metadata)
        return self._artifacts[id]

    def forced(self, spec: StageSpec) -> tuple[str, ...]:
        """Why a stage runs whatever there is; one before `--from` is only looked up."""
        if spec.stage.effect:
            return ("it acts on the world, so it is never cached",)
        if spec.id not in self.given and (self.refresh or spec.cache == "refresh"):
            return ("cache: refresh",)
        return ("cache: off",) if spec.cache == "off" else ()


def needed_again(specs: Sequence[StageSpec], decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions, with those stages run again whose collected bytes another one that runs will read."""
    by_id = {decision.id: decision for decision in decisions}
    declared = {spec.id: spec for spec in specs}
    if any(decision.collected for decision in decisions):
        for spec in reversed(specs):
            if not by_id[spec.id].works:
                continue
            for stage in _read_by(spec, declared, by_id):
                if by_id[stage].collected:
                    why = (f"`{spec.id}` needs its bytes again (ephemeral)",)
                    again = replace(by_id[stage], action="run", why=why, needed_by=spec.id)
                    by_id[stage] = replace(again, pointer=None, outputs={}, collected=False)
    return list(by_id.values())


def _read_by(spec: StageSpec, declared: Mapping[str, StageSpec], by_id: Mapping[str, Decision]) -> Iterator[str]:
    """The stages whose bytes `spec` reads; what it takes from a `select` stage is the winners'."""
    for stage in sources(spec):
        choice = by_id[stage].choice if stage in by_id else None
        if choice is None:
            yield from (stage,) if stage in by_id else ()
        else:
            rows = [refs[choice.row] for refs in declared[stage].inputs.values()]
            yield from (ref.stage for ref in rows if isinstance(ref, StageRef) and ref.stage in by_id)


def _waiting(waits: Sequence[str]) -> tuple[str, ...]:
    more = f" and {len(waits) - FEW} more" if len(waits) > FEW else ""
    return tuple(f"needs the result of `{stage}`{more if stage == waits[:FEW][-1] else ''}" for stage in waits[:FEW])


def sources(spec: StageSpec) -> list[str]:
    """The stages whose outputs it reads."""
    refs = [ref for bound in spec.inputs.values() for ref in bound]
    return list(dict.fromkeys(ref.stage for ref in refs if isinstance(ref, StageRef)))
