"""What is still needed: from names, recent runs, work in progress and other projects, back through what made it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmctl.store import names
from llmctl.store.layout import digest_of
from llmctl.store.locks import running
from llmctl.store.manifest import Manifest
from llmctl.store.roots import registered
from llmctl.store.store import ID, Store

Depth = Literal["none", "inputs", "all"]
DAY = 86_400.0
RUN_FILES = ("run.json", "spec.json", "events.jsonl", "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How much is kept."""

    days: float = 30
    """Runs younger than this keep their results."""
    runs: int = 20
    """So do the last so many."""
    lineage: Depth = "inputs"
    """`none`: roots alone. `inputs`: also what they were made from, all the way back. `all`: also what later producers
    of the same bytes were made from, and the other outputs of the stages on the way."""
    recent: float = DAY
    """Seconds within which nothing goes that was committed or used."""
    unfinished: float = 14 * DAY
    """Seconds after which the state of work that was never finished goes."""


@dataclass(kw_only=True)
class Kept:
    """The outcome: content ids and runs that stay."""

    ids: set[str] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)


def reachable(store: Store, rules: Rules, manifests: dict[str, Manifest], now: float) -> Kept:
    """Everything that some root needs. `manifests` are those of all artifacts, by id."""
    kept = Kept(runs=kept_runs(store, rules, now))
    roots = {id for run in kept.runs for id in run_ids(store, run)}
    roots |= {str(ref.get("id")) for ref in names.every(store).values()}
    roots |= {str(ref.get("id")) for project in registered(store) for ref in project.refs()}
    roots |= {
        id for request in requests(store) if is_held(store, str(request["resume"])) for id in request_ids(request)
    }
    roots |= {id for id, manifest in manifests.items() if age(store.artifact(id), manifest, now) < rules.recent}
    queue = list(roots)
    while queue:
        id = queue.pop()
        if id in kept.ids:
            continue
        kept.ids.add(id)
        if id in manifests:
            queue += _behind(store, manifests[id], rules.lineage)
    return kept


def _behind(store: Store, manifest: Manifest, depth: Depth) -> Iterator[str]:
    """The artifacts that come along with one that is kept."""
    if depth == "none":
        return
    yield from input_ids(manifest.provenance)
    if depth == "all":
        records = [names.read_json(path) for path in store.records(manifest.id).glob("*.json")]
        for origin in (manifest.provenance, *(names.mapping(record.get("provenance")) for record in records)):
            yield from input_ids(origin)
            pointer = store.pointer(str(origin.get("key"))) if origin.get("key") else None
            if pointer is not None:
                yield from map(str, pointer.outputs.values())


def input_ids(provenance: Any) -> Iterator[str]:
    """The ids of `inputs` of a provenance or a pre-image."""
    for ids in names.mapping(provenance.get("inputs")).values():
        yield from map(str, ids if isinstance(ids, list) else ())


def age(directory: Path, manifest: Manifest | None, now: float) -> float:
    """Seconds since an artifact was committed or last found by somebody, whichever is later."""
    times = [modified(directory) or 0.0]
    if manifest is not None:
        times.append(seconds(str(manifest.provenance.get("ended", ""))))
    return now - max(times)


def modified(path: Path) -> float | None:
    """When a file or a directory was last changed; None if it is gone: somebody else collects, too."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def untouched(path: Path, now: float) -> float:
    """Seconds since a file or a directory was last changed; -1 if it is gone, so that there is nothing to take."""
    then = modified(path)
    return -1.0 if then is None else now - then


def seconds(stamp: str) -> float:
    """A timestamp of llmctl as seconds since 1970; 0 if it is none."""
    import calendar

    try:
        return float(calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0


def is_held(store: Store, resume: str) -> bool:
    """Whether a stage with this resume key is at work, in whichever of its work directories."""
    return any(running(path) is not None for path in store.lock(resume).parent.glob(f"{digest_of(resume)}*.lock"))


# -- runs -------------------------------------------------------------------------------------------------------------


def kept_runs(store: Store, rules: Rules, now: float) -> set[str]:
    """Runs that are young, among the last, or going on: they hold a lock, or wrote an event and no result yet."""
    folders = sorted(path for path in (store.root / "runs").glob("*") if path.is_dir())
    kept = {path.name for path in folders[-rules.runs :]} if rules.runs else set()
    kept |= {run for path in (store.root / "locks").glob("*.lock") if (run := running(path))}
    for path in folders:
        idle = now - max(modified(file) or 0.0 for file in (path, *map(path.joinpath, RUN_FILES)))
        open_ = not (path / "run.json").exists() and idle < rules.recent
        if open_ or idle < rules.days * DAY:
            kept.add(path.name)
    return kept


def run_ids(store: Store, run: str) -> set[str]:
    """The artifacts that a run has made, taken from the cache, or was given by id; of one that goes on: so far."""
    folder = store.run(run)
    result = names.read_json(folder / "run.json")
    stages = list(names.objects(result.get("stages")))
    found = {str(out.get("id")) for stage in stages for out in names.objects(stage.get("outputs"))}
    found |= set(_key_outputs(store, (str(stage.get("key")) for stage in stages if stage.get("key"))))
    if not result:
        found |= _event_ids(store, folder / "events.jsonl")
    asked = names.objects(names.read_json(folder / "spec.json").get("stages"))
    refs = (ref for stage in asked for ref in input_ids(stage))
    return found | {id for ref in refs if ref.startswith("sha256:") and ID.match(ref) for id in _whole(store, ref)}


def _event_ids(store: Store, path: Path) -> set[str]:
    found: set[str] = set()
    keys: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if not isinstance(event, dict):
            continue
        if event.get("key"):
            keys.add(str(event["key"]))
        if event.get("type") == "artifact":
            found.add(str(event.get("id")))
    return found | set(_key_outputs(store, keys))


def _key_outputs(store: Store, keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if pointer := store.pointer(key):
            yield from map(str, pointer.outputs.values())


def _whole(store: Store, prefix: str) -> list[str]:
    digits = digest_of(prefix)
    return [f"sha256:{path.name}" for path in (store.root / "artifacts" / "sha256" / digits[:2]).glob(f"{digits}*")]


# -- work in progress -------------------------------------------------------------------------------------------------


def requests(store: Store) -> Iterator[dict[str, Any]]:
    """What stages were or are asked to do."""
    for path in sorted((store.root / "requests").glob("*/*.json")):
        request = names.read_json(path)
        if "resume" in request and "key" in request:
            yield request


def request_ids(request: dict[str, Any]) -> Iterator[str]:
    """The artifacts that a stage was given."""
    for rows in names.mapping(request.get("inputs")).values():
        yield from (str(names.mapping(row).get("id")) for row in (rows if isinstance(rows, list) else ()))
