"""`llmctl why`: what decides that a stage runs again, value by value, or what two results differ in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.errors import InputError, UsageError
from llmctl.pipeline.changes import Change, changes
from llmctl.pipeline.commands import spec_store, strict_option
from llmctl.pipeline.drift import drift
from llmctl.spec.options import spec_layers
from llmctl.store.commands import format_option, print_as, store_option
from llmctl.store.external import read_note
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.names import read_json
from llmctl.store.store import Store

if TYPE_CHECKING:
    from llmctl.pipeline.plan import Decision, Planner
    from llmctl.spec.overrides import Setting
    from llmctl.spec.resolved import Pipeline, StageSpec


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
@strict_option
@store_option
@format_option
def why(
    first: str,
    second: str,
    profiles: tuple[str, ...],
    sets: tuple[Setting, ...],
    strict: bool,
    store_path: Path | None,
    format_: str,
) -> None:
    """Say what differs between what SPEC asks of STAGE now and the stage's last result, or between two artifacts.

    Only what is listed makes a stage run again. What was observed (versions of libraries) is shown for information.
    """
    if _is_spec(first):
        from llmctl.registry import get_registry
        from llmctl.spec.pipeline import load_pipeline

        pipeline = load_pipeline(first, profiles, sets, registry=get_registry())
        answer = explain_stage(pipeline, Store.open(store_path or spec_store(pipeline)), second, strict=strict)
    elif profiles or sets or strict:
        hint = "llmctl why SPEC STAGE --set STAGE.PARAM=VALUE"
        raise UsageError("--profile, --set and --strict-env belong to a spec", hint=hint)
    else:
        answer = compare(Store.open(store_path), first, second)
    print_as(format_, _record(answer), lambda: _text(answer))


def _is_spec(text: str) -> bool:
    from llmctl.spec.files import shipped

    return Path(text).is_file() or text in shipped() or text.endswith((".yaml", ".yml"))


# -- a stage of a spec ------------------------------------------------------------------------------------------------


def explain_stage(pipeline: Pipeline, store: Store, stage: str, *, strict: bool = False) -> Answer:
    """Compare what a spec asks of a stage now with its last result. Raises what `plan` raises."""
    from llmctl.pipeline.inputs import Inputs
    from llmctl.pipeline.plan import Planner
    from llmctl.pipeline.selection import instances, select
    from llmctl.registry import get_registry

    rows = instances(pipeline, stage)
    if len(rows) > 1:
        raise UsageError(f"`{stage}` has {len(rows)} instances", hint=f"choose one, e.g. '{rows[0]}'")
    (stage,) = rows
    specs = select(pipeline, [stage]).specs
    inputs = Inputs(pipeline, store)
    inputs.check_paths(specs)
    planner = Planner(pipeline, store, get_registry(), strict=strict)
    decisions = {decision.id: decision for decision in planner.plan(specs, inputs)}
    spec, decision = pipeline.stages[stage], decisions[stage]
    answer = Answer(subject=f"{pipeline.name}/{stage}", state=decision.action)
    waiting = [decisions[id] for id in spec.dependencies if decisions[id].works and decision.keys is None]
    answer.reasons = [f"`{one.id}` runs first: {'; '.join(one.why)}" for one in waiting]
    if spec.select is not None:  # it makes nothing, so there is no result to compare with
        answer.reasons += decision.why if not waiting else ()
        return answer
    _compare_with_last(planner, spec, decision, answer)
    return answer


def _compare_with_last(planner: Planner, spec: StageSpec, decision: Decision, answer: Answer) -> None:
    """Add to the answer what differs from the stage's last result, and why it runs, or does not, if nothing does."""
    from llmctl.store.keys import static_preimage

    store, pipeline = planner.store, planner.pipeline.name
    latest = planner.latest(spec)
    last = _result(store, *(str(latest.get(name, "")) for name in ("id", "key", "run"))) if latest else None
    if last is not None:
        now = decision.keys.preimage if decision.keys else static_preimage(spec, planner.origin(spec), planner.strict)
        titles = {port: ", ".join(map(str, refs)) for port, refs in spec.inputs.items()}
        answer.last = {name: str(last.get(name, "")) for name in ("key", "run", "ended")}
        answer.changes = [named(store, change, titles) for change in changes(last["preimage"], now)]
        answer.drift = [Change(part=what, before=then, after=now) for what, then, now in drift(last["observed"])]
    forced = planner.forced(spec)
    answer.reasons += forced
    if not answer.changes and not forced and decision.keys is not None:
        answer.reasons.append(_no_difference(store, decision, last))
    elif decision.pointer is not None:
        answer.reasons.append(f"a result of run {decision.pointer.run} fits, it is cached")
    if decision.action == "run" and decision.keys is not None:
        answer.reasons += _failures(store, pipeline, spec.id, decision.keys.action)


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


def _no_difference(store: Store, decision: Decision, last: dict[str, Any] | None) -> str:
    """What is to be said of a stage whose key is that of its last result, or that has none."""
    if decision.pointer is not None:
        return f"nothing differs, it is cached: run {decision.pointer.run} made it"
    pointer = store.pointer(decision.keys.action) if decision.keys else None
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
    answer.changes = [named(store, one, {}) for one in changes(sides[0]["preimage"], sides[1]["preimage"])]
    names = sorted(set(sides[0]["observed"]) | set(sides[1]["observed"]))
    pairs = ((name, sides[0]["observed"].get(name, "none"), sides[1]["observed"].get(name, "none")) for name in names)
    answer.drift = [Change(part=name, before=old, after=new) for name, old, new in pairs if old != new]
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


def named(store: Store, change: Change, titles: Mapping[str, str]) -> Change:
    """A change of an input with what went and came in words, and its files; any other as it is.

    `titles` says what ports are bound to now.
    """
    if change.part != "inputs":
        return change
    before, after = change.before, change.after
    gone, come = [id for id in before if id not in after], [id for id in after if id not in before]
    title = titles.get(change.name, "")
    if not gone and not come:
        return replace(change, before="the same", after="in another order", title=title)
    words = {"before": _named(store, gone, before), "after": _named(store, come, after)}
    return replace(change, **words, title=title, files=_files(store, gone, come))


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


def _record(answer: Answer) -> dict[str, Any]:
    record = {name: getattr(answer, name) for name in ("subject", "state", "reasons", "last")}
    return record | {name: [one.to_json() for one in getattr(answer, name)] for name in ("changes", "drift")}


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
