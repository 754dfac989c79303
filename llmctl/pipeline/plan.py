"""What a run would do with each stage, and why: compares the key with what the store holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmctl.pipeline.inputs import Inputs
from llmctl.registry import Registry
from llmctl.spec.resolved import Pipeline, StageRef, StageSpec
from llmctl.stage import Artifact
from llmctl.store import Store, names
from llmctl.store.keys import Keys, make_keys, static_preimage
from llmctl.store.store import Pointer

Action = Literal["cached", "run", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do with one stage. `unknown` means that it depends on the bytes of an input that is yet to be made."""

    id: str
    action: Action
    why: tuple[str, ...] = ()
    keys: Keys | None = None
    """None while inputs are unknown."""
    pointer: Pointer | None = None
    """The cached result."""


class Planner:
    """Decides stage by stage; the runner asks again with real inputs when a stage's turn has come."""

    def __init__(self, pipeline: Pipeline, store: Store, registry: Registry, *, refresh: bool = False) -> None:
        self.pipeline = pipeline
        self.store = store
        self.registry = registry
        self.refresh = refresh

    def plan(self, specs: Sequence[StageSpec], inputs: Inputs) -> list[Decision]:
        """A decision per stage; those of cached stages give the inputs of the later ones."""
        outputs: dict[str, Mapping[str, Artifact]] = {}
        decisions = []
        for spec in specs:
            waits = [stage for stage in _sources(spec) if stage not in outputs]
            decision = self.decide(spec, inputs.bind(spec, outputs), waits)
            if decision.pointer is not None:
                outputs[spec.id] = {port: self.store.get(id) for port, id in decision.pointer.outputs.items()}
            decisions.append(decision)
        return decisions

    def decide(
        self, spec: StageSpec, bound: Mapping[str, Sequence[Artifact]] | None, waits: Sequence[str] = ()
    ) -> Decision:
        """What to do with `spec` given its inputs; None if they are not known until the stages `waits` have run."""
        origin = self.registry.origin(spec.stage.name)
        last = self.last(spec)
        if bound is None:
            changes = tuple(differences(last.preimage, static_preimage(spec, origin))) if last else ("new",)
            forced = self._forced(spec)
            action: Action = "run" if changes or forced else "unknown"
            needs = tuple(f"needs the result of `{stage}`" for stage in waits)
            return Decision(id=spec.id, action=action, why=(*forced, *changes) or needs)
        keys = make_keys(spec, origin, {port: [a.id for a in artifacts] for port, artifacts in bound.items()})
        if forced := self._forced(spec):
            return Decision(id=spec.id, action="run", why=forced, keys=keys)
        if pointer := self.store.lookup(keys.action):
            return Decision(id=spec.id, action="cached", keys=keys, pointer=pointer)
        if self.store.pointer(keys.action) is not None:
            why: tuple[str, ...] = ("its artifact is gone or damaged",)
        else:
            why = tuple(differences(last.preimage, keys.preimage)) if last else ("new",)
        return Decision(id=spec.id, action="run", why=why or ("it was not finished",), keys=keys)

    def last(self, spec: StageSpec) -> Pointer | None:
        """The latest result of this stage in this pipeline, to compare with."""
        refs = names.candidates(self.store, f"{self.pipeline.name}/{spec.id}").values()
        latest = max(refs, key=lambda ref: str(ref.get("time", "")), default=None)
        return self.store.pointer(str(latest["key"])) if latest else None

    def _forced(self, spec: StageSpec) -> tuple[str, ...]:
        if spec.stage.effect:
            return ("it acts on the world, so it is never cached",)
        if self.refresh or spec.cache == "refresh":
            return ("cache: refresh",)
        return ("cache: off",) if spec.cache == "off" else ()


def _sources(spec: StageSpec) -> list[str]:
    refs = [ref for bound in spec.inputs.values() for ref in bound]
    return list(dict.fromkeys(ref.stage for ref in refs if isinstance(ref, StageRef)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two pre-images, a phrase each; only parts that `new` has are compared."""
    if old.get("stage") != new["stage"]:
        yield f"stage {old.get('stage')} → {new['stage']}"
    plugin = old.get("plugin", {})
    for name, value in new["plugin"].items():
        if plugin.get(name) != value:
            what = "the plugin's source changed" if name == "src" else f"plugin {name} {plugin.get(name)} → {value}"
            yield what
    yield from _changes("", old.get("with", {}), new["with"], "default")
    yield from _changes("env ", old.get("env", {}), new["env"], "unset")
    yield from _changes("", old.get("key_deps", {}), new["key_deps"], "none")
    if "inputs" in new:
        yield from _input_changes(old.get("inputs", {}), new["inputs"])


def _changes(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any], absent: str) -> Iterator[str]:
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name, absent), new.get(name, absent)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(f"{prefix}{name}.", before, after, absent)
        elif before != after:
            yield f"{prefix}{name} {_short(before)} → {_short(after)}"


def _input_changes(old: Mapping[str, Sequence[str]], new: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for port in sorted(set(old) | set(new)):
        before, after = old.get(port, []), new.get(port, [])
        if len(before) == len(after) == 1 and before != after:
            yield f"input {port} changed ({before[0][7:15]} → {after[0][7:15]})"
        elif list(before) != list(after):
            yield f"input {port} changed ({len(before)} → {len(after)} artifacts)"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
