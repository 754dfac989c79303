"""`llmctl why`: what decides that a stage runs again, value by value, or what two results differ in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.errors import InputError, UsageError
from llmctl.pipeline.drift import drift
from llmctl.spec.options import spec_layers
from llmctl.store.commands import format_option, print_as, store_option
from llmctl.store.external import read_note
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.names import read_json
from llmctl.store.store import Store

if TYPE_CHECKING:
    from llmctl.spec.overrides import Setting

ABSENT = {"with": "default", "env": "unset", "key_deps": "none"}
"""What a value is called that only one side has."""
SHOWN = 6
"""Files of a directory that are listed in text."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One difference between two pre-images: `with.lr`, `inputs.text`, `env.X`, `key_deps.click`, `plugin.rev`."""

    what: str
    before: Any
    after: Any
    files: tuple[str, ...] = ()
    """For an input: which of its files differ, if that is known: `changed a.md`, `new b.md`, `gone c.md`."""

    @property
    def text(self) -> str:
        """A line for a person."""
        line = f"{self.what} {_short(self.before)} → {_short(self.after)}"
        if not self.files:
            return line
        more = f", and {len(self.files) - SHOWN} more" if len(self.files) > SHOWN else ""
        return f"{line}\n    {', '.join(self.files[:SHOWN])}{more}"


@dataclass(kw_only=True)
class Answer:
    """What `why` found out."""

    subject: str
    state: str
    """`cached`, `run`, `unknown`, `select` or, for two artifacts, `compared`."""
    reasons: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    last: dict[str, str] = field(default_factory=dict)
    """The result that was compared with: key, run, ended."""
    drift: list[Change] = field(default_factory=list)
    """What was observed then and is different now; in no key, so nothing runs again for it."""


@click.command()
@click.argument("first", metavar="SPEC|ARTIFACT")
@click.argument("second", metavar="STAGE|ARTIFACT")
@spec_layers
@store_option
@format_option
def why(
    first: str,
    second: str,
    profiles: tuple[str, ...],
    sets: tuple[Setting, ...],
    store_path: Path | None,
    format_: str,
) -> None:
    """Say what differs between what SPEC asks of STAGE now and the stage's last result, or between two artifacts.

    Only what is listed makes a stage run again. What was observed (versions of libraries) is shown for information.
    """
    store = Store.open(store_path)
    if _is_spec(first):
        answer = explain_stage(store, first, second, profiles, sets)
    elif profiles or sets:
        raise UsageError("--profile and --set belong to a spec", hint="llmctl why SPEC STAGE --set STAGE.PARAM=VALUE")
    else:
        answer = compare(store, first, second)
    print_as(format_, _record(answer), lambda: _text(answer))


def _is_spec(text: str) -> bool:
    from llmctl.spec.files import shipped

    return Path(text).is_file() or text in shipped() or text.endswith((".yaml", ".yml"))


# -- a stage of a spec ------------------------------------------------------------------------------------------------


def explain_stage(store: Store, spec_name: str, stage: str, profiles: Sequence[str], sets: Sequence[Setting]) -> Answer:
    """Compare what a spec asks of a stage now with its last result. Raises what `plan` raises."""
    from llmctl.pipeline.inputs import Inputs
    from llmctl.pipeline.plan import Planner
    from llmctl.pipeline.selection import instances, select
    from llmctl.registry import get_registry
    from llmctl.spec.pipeline import load_pipeline
    from llmctl.store.keys import static_preimage

    registry = get_registry()
    pipeline = load_pipeline(spec_name, profiles, sets, registry=registry)
    rows = instances(pipeline, stage)
    if len(rows) > 1:
        raise UsageError(f"`{stage}` has {len(rows)} instances", hint=f"choose one, e.g. '{rows[0]}'")
    specs = select(pipeline, [stage]).specs
    inputs = Inputs(pipeline, store)
    inputs.check_paths(specs)
    planner = Planner(pipeline, store, registry)
    decisions = {decision.id: decision for decision in planner.plan(specs, inputs)}
    spec, decision = pipeline.stages[stage], decisions[stage]
    now = dict(decision.keys.preimage) if decision.keys else static_preimage(spec, registry.origin(spec.stage.name))
    titles = {port: ", ".join(map(str, refs)) for port, refs in spec.inputs.items()}
    answer = Answer(subject=f"{pipeline.name}/{stage}", state=decision.action)
    if spec.select is not None:  # it makes nothing, so there is no result to compare with
        answer.reasons = list(decision.why)
        return answer
    last = _last(store, pipeline.name, stage)
    if last is not None:
        answer.last = {name: str(last.get(name, "")) for name in ("key", "run", "ended")}
        answer.changes = list(changes(store, last["preimage"], now, titles))
        answer.drift = [Change(what=what, before=then, after=now) for what, then, now in drift(last["observed"])]
    forced = _forced(spec)
    if decision.keys is None:
        waiting = [decisions[id] for id in spec.dependencies if decisions[id].action != "cached"]
        answer.reasons = [f"`{one.id}` runs first: {'; '.join(one.why)}" for one in waiting]
    answer.reasons += forced
    if not answer.changes and not forced and decision.keys is not None:
        answer.reasons.append(_no_difference(store, decision, last))
    elif decision.action == "cached" and decision.pointer is not None:
        answer.reasons.append(f"a result of run {decision.pointer.run} fits, it is cached")
    if decision.action == "run" and decision.keys is not None:
        answer.reasons += _failures(store, pipeline.name, stage, decision.keys.action)
    return answer


def _forced(spec: Any) -> list[str]:
    """Why a stage runs whatever there is."""
    if spec.stage.effect:
        return ["it acts on the world, so it is never cached"]
    return [f"cache: {spec.cache}"] if spec.cache != "auto" else []


def _last(store: Store, pipeline: str, stage: str) -> dict[str, Any] | None:
    """The last result under the stage's name: its pre-image, what was observed, key, run, end."""
    from llmctl.store.names import Names

    refs = Names(store).of(pipeline, stage).values()
    latest = max(refs, key=lambda ref: str(ref.get("time", "")), default=None)
    if latest is None:
        return None
    return _result(store, str(latest.get("id", "")), str(latest.get("key", "")), str(latest.get("run", "")))


def _result(store: Store, id: str, key: str, run: str = "") -> dict[str, Any] | None:
    """What is known of the execution `key` that gave the artifact `id`: by its pointer, else by the manifest."""
    try:
        first = dict(Manifest.read(store.artifact(id)).provenance)
    except (OSError, BadManifest):
        first = {}
    record = dict(read_json(store.record(id, key)).get("provenance") or {}) if key else {}
    origin = record or (first if first.get("key") == key or not key else {})
    pointer = store.pointer(key) if key else None
    if pointer is not None:
        preimage: Mapping[str, Any] = pointer.preimage
    elif origin:
        plugin = {name: origin.get("plugin", {}).get(name) for name in ("dist", "rev")}
        preimage = {
            **{name: origin.get(name, {}) for name in ("stage", "with", "env", "key_deps", "inputs")},
            "plugin": plugin,
        }
    else:
        return None
    return {
        "preimage": preimage,
        "observed": dict(origin.get("observed") or {}),
        "key": key,
        "run": str(origin.get("run", "")) or (pointer.run if pointer else run),
        "ended": str(origin.get("ended", "")) or (pointer.ended if pointer else ""),
    }


def _no_difference(store: Store, decision: Any, last: dict[str, Any] | None) -> str:
    """What is to be said of a stage whose key is that of its last result, or that has none."""
    if decision.action == "cached":
        return f"nothing differs, it is cached: run {decision.pointer.run} made it"
    pointer = store.pointer(decision.keys.action)
    if pointer is not None:
        lost = [f"{port} {id[:15]}" for port, id in pointer.outputs.items() if _is_lost(store, id)]
        return f"nothing differs, but its result is gone or damaged: {', '.join(lost)}"
    return "nothing differs, but it was never finished" if last else "it has no result in this store yet"


def _is_lost(store: Store, id: str) -> bool:
    from llmctl.store.commit import intact

    return intact(store.artifact(id)) is None


def _failures(store: Store, pipeline: str, stage: str, key: str) -> Iterator[str]:
    """The last run of the stage, if it failed or was stopped with this very key."""
    for path in sorted(
        (store.root / "runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    ):
        run = read_json(path)
        result = dict(run.get("stages") or {}).get(stage)
        if run.get("pipeline") != pipeline or not result or result.get("status") in ("skipped", "cached"):
            continue
        if result.get("key") == key and result.get("status") in ("failed", "stopped"):
            word = "failed" if result["status"] == "failed" else "was stopped"
            yield f"run {path.parent.name}: it {word}: {result.get('message')}"
        return


# -- two artifacts ----------------------------------------------------------------------------------------------------


def compare(store: Store, first: str, second: str) -> Answer:
    """What the executions that made two artifacts differ in."""
    sides = [_made(store, first), _made(store, second)]
    answer = Answer(subject=f"{first} and {second}", state="compared")
    answer.changes = list(changes(store, sides[0]["preimage"], sides[1]["preimage"], {}))
    names = sorted(set(sides[0]["observed"]) | set(sides[1]["observed"]))
    pairs = ((name, sides[0]["observed"].get(name, "none"), sides[1]["observed"].get(name, "none")) for name in names)
    answer.drift = [Change(what=name, before=old, after=new) for name, old, new in pairs if old != new]
    if not answer.changes:
        same = sides[0]["id"] == sides[1]["id"]
        answer.reasons.append(
            "they are one artifact" if same else "nothing differs: the stage gives other bytes each time"
        )
    return answer


def _made(store: Store, text: str) -> dict[str, Any]:
    artifact = store.resolve(text)
    try:
        origin = Manifest.read(artifact.path).provenance
    except (OSError, BadManifest):
        origin = {}
    found = _result(store, artifact.id, str(origin.get("key", ""))) if origin.get("stage") else None
    if found is None:
        raise InputError(f"{text} was not made by a stage", hint="why compares results of stages, or SPEC with STAGE")
    return {**found, "id": artifact.id}


# -- differences ------------------------------------------------------------------------------------------------------


def changes(
    store: Store, old: Mapping[str, Any], new: Mapping[str, Any], titles: Mapping[str, str]
) -> Iterator[Change]:
    """What differs between two pre-images; inputs only if `new` knows them. `titles`: what ports are bound to now."""
    if old.get("stage") != new.get("stage"):
        yield Change(what="stage", before=old.get("stage"), after=new.get("stage"))
    before, after = old.get("plugin") or {}, new.get("plugin") or {}
    for name in ("dist", "rev", "src"):
        if before.get(name) != after.get(name) and (name != "src" or {"src"} <= set(before) | set(after)):
            yield Change(what=f"plugin.{name}", before=before.get(name), after=after.get(name))
    for part, absent in ABSENT.items():
        yield from _values(part, old.get(part) or {}, new.get(part) or {}, absent)
    if "inputs" in new:
        yield from _inputs(store, old.get("inputs") or {}, new["inputs"], titles)


def _values(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any], absent: str) -> Iterator[Change]:
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name, absent), new.get(name, absent)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _values(f"{prefix}.{name}", before, after, absent)
        elif before != after:
            yield Change(what=f"{prefix}.{name}", before=before, after=after)


def _inputs(
    store: Store, old: Mapping[str, Sequence[str]], new: Mapping[str, Sequence[str]], titles: Mapping[str, str]
) -> Iterator[Change]:
    for port in sorted(set(old) | set(new)):
        before, after = list(old.get(port, ())), list(new.get(port, ()))
        if before == after:
            continue
        gone, come = [id for id in before if id not in after], [id for id in after if id not in before]
        files = _files(store, gone, come)
        title = f" ({titles[port]})" if titles.get(port) else ""
        if not gone and not come:
            yield Change(what=f"inputs.{port}{title}", before="the same", after="in another order")
        else:
            yield Change(
                what=f"inputs.{port}{title}",
                before=_named(store, gone, before),
                after=_named(store, come, after),
                files=files,
            )


def _named(store: Store, ids: Sequence[str], all: Sequence[str]) -> str:
    """What some of the ids of a port are, by stage or path where that is known."""
    if not ids:
        return f"{len(all)} artifacts" if all else "unbound"
    if len(ids) > 3:
        return f"{len(ids)} of {len(all)} artifacts"
    return ", ".join(f"{_title(store, id)}{id[7:15]}" for id in ids)


def _title(store: Store, id: str) -> str:
    try:
        return f"{Manifest.read(store.artifact(id)).provenance['instance']} "
    except (OSError, BadManifest, KeyError):
        path = read_note(store, id).get("path")
        return f"{Path(path).name} " if path else ""


def _files(store: Store, gone: Iterable[str], come: Iterable[str]) -> tuple[str, ...]:
    """Which files differ between artifacts that went and that came; nothing if some of their lists are not known."""
    sides: list[dict[str, str]] = []
    for ids in (list(gone), list(come)):
        side: dict[str, str] = {}
        for id in ids:
            listed = _listed(store, id)
            if listed is None:
                return ()
            side |= listed
        sides.append(side)
    old, new = sides
    words = [f"changed {name}" for name in old if name in new and old[name] != new[name]]
    words += [f"new {name}" for name in new if name not in old] + [f"gone {name}" for name in old if name not in new]
    return tuple(sorted(words, key=lambda word: word.partition(" ")[2]))


def _listed(store: Store, id: str) -> dict[str, str] | None:
    """Files of an artifact or of an input from outside with their digests; None if they are not known."""
    try:
        return {file.path: file.sha256 for file in Manifest.read(store.artifact(id)).files}
    except (OSError, BadManifest):
        note = read_note(store, id)
    rows = note.get("files") or []
    return {row["path"]: row["sha256"] for row in rows} if rows and note.get("count") == len(rows) else None


# -- printing ---------------------------------------------------------------------------------------------------------


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _record(answer: Answer) -> dict[str, Any]:
    return asdict(answer)


def _text(answer: Answer) -> str:
    words = {
        "cached": "cached",
        "run": "would run",
        "unknown": "depends on what runs before it",
        "select": "picks a row",
        "compared": "compared",
    }
    lines = [f"{answer.subject}: {words[answer.state]}"]
    if answer.last.get("run"):
        lines.append(f"compared with the result of run {answer.last['run']}, {answer.last['ended']}")
    lines += [f"  {change.text}" for change in answer.changes]
    lines += [f"  {reason}" for reason in answer.reasons]
    if answer.drift:
        lines.append("observed, in no key: " + ", ".join(change.text for change in answer.drift))
    return "\n".join(lines)
