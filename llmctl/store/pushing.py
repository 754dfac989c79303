"""Push: files first, the manifest last, then what leads to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from llmctl.errors import InputError
from llmctl.store import names
from llmctl.store.manifest import NAME, FileEntry, Manifest
from llmctl.store.progress import Meter
from llmctl.store.reachable import input_ids
from llmctl.store.remote import Remote
from llmctl.store.store import Store, is_id
from llmctl.store.transfer import (
    RUN,
    Report,
    Selection,
    json_object,
    parallel,
    parse_pointer,
    pointer_outputs,
    remote_manifest,
    run_outputs,
)
from llmctl.store.verification import inspect


def push(store: Store, remote: Remote, texts: Sequence[str], *, lineage: bool, alone: bool, force: bool) -> Report:
    """Copy artifacts with the keys and names that lead to them. `force` writes files again that look whole there.

    InputError before anything is sent if one is missing or damaged here, or if something else is there.
    """
    _check_other(store, remote)
    asked = _asked(store, texts)
    manifests = {id: store.manifest(store.use(id).id) for id in _closure(store, asked.ids, lineage, alone)}
    with Meter("hashing", sum(manifest.bytes for manifest in manifests.values())) as meter:
        for id in manifests:
            if problems := inspect(store.artifact(id), id, deep=True, hashed=meter):
                raise InputError(f"{id[:15]} is not pushed: {problems[0]}", hint="run its stage again")
    remote.mark()
    report = Report()
    with Meter("push", sum(manifest.bytes for manifest in manifests.values())) as meter:
        for manifest in manifests.values():
            moved = _push_one(store, remote, manifest, meter, force)
            (report.moved if moved else report.skipped).append(manifest)
    _push_beside(store, remote, manifests)
    report.keys = _push_keys(store, remote, manifests)
    _push_names(store, remote, manifests, report)
    for run in asked.runs:
        for name in ("spec.json", "run.json"):
            path = store.run(run) / name
            if path.is_file():
                remote.write(remote.path(remote.layout.run(run) / name), path.read_bytes())
    return report


def _check_other(store: Store, remote: Remote) -> None:
    if remote.directory is not None and remote.directory.resolve().is_relative_to(store.root.resolve()):
        raise InputError(f"{remote.uri} is this store itself", hint="push to another one")


def _asked(store: Store, texts: Sequence[str]) -> Selection:
    ids: list[str] = []
    runs = []
    for text in texts:
        if text.startswith("run:"):
            run = text.removeprefix("run:")
            result = names.read_json(store.run(run) / "run.json") if RUN.match(run) else {}
            if not result:
                raise InputError(f"there is no finished run {run} in {store.root}", hint=_runs_hint(store))
            runs.append(run)
            ids += run_outputs(result)
        else:
            found = store.resolve(text)
            ids.append(store.use(found.id).id)
    return Selection(ids=tuple(dict.fromkeys(ids)), runs=tuple(runs))


def _runs_hint(store: Store) -> str:
    known = sorted(path.parent.name for path in (store.root / "runs").glob("*/run.json"))
    return f"the latest: {', '.join(known[-3:])}" if known else "nothing has run with this store yet"


def _closure(store: Store, ids: Iterable[str], lineage: bool, alone: bool) -> list[str]:
    """The ids and what comes along: the other outputs of their results, and what they were made from."""
    found: dict[str, None] = {}
    queue = list(ids)
    while queue:
        id = queue.pop(0)
        if id in found or not (store.artifact(id) / NAME).is_file():
            continue
        found[id] = None
        origin = store.manifest(id).provenance
        if not alone:
            queue += [out for key in _keys_of(store, id) for out in pointer_outputs(store.pointer(key))]
        if lineage:
            queue += input_ids(origin)
    return list(found)


def _keys_of(store: Store, id: str) -> list[str]:
    """The keys of all stages that made these bytes."""
    first = store.manifest(id).provenance.get("key")
    return [
        *([str(first)] if is_id(first) else []),
        *(f"sha256:{path.stem}" for path in sorted(store.records(id).glob("*.json"))),
    ]


def _push_one(store: Store, remote: Remote, manifest: Manifest, meter: Meter, force: bool) -> bool:
    """Send the files that are not there, the manifest last; False if all of it was there.

    What is whole there is overwritten file by file, so that those who read it meanwhile go on.
    """
    folder = remote.path(remote.layout.artifact(manifest.id))
    there = remote.sizes(folder)
    marked = remote_manifest(remote, manifest.id) if NAME in there else None
    lacking = [file for file in manifest.files if there.get(file.path) != file.size]
    whole = marked is not None and not lacking
    if whole and not force:
        meter(manifest.bytes)
        return False
    missing = list(manifest.files) if force else lacking
    if NAME in there and not whole:
        remote.delete(f"{folder}/{NAME}")  # what is incomplete must not look whole while it is mended
    meter(manifest.bytes - sum(file.size for file in missing))

    def send(file: FileEntry) -> None:
        remote.upload(store.artifact(manifest.id) / file.path, f"{folder}/{file.path}")
        meter(file.size)

    parallel(send, missing)
    remote.upload(store.artifact(manifest.id) / NAME, f"{folder}/{NAME}")
    return True


def _push_beside(store: Store, remote: Remote, manifests: Iterable[str]) -> None:
    """Signatures, and records of later producers, whose keys lead here too."""
    for id in manifests:
        for path in sorted(store.signatures(id).glob("*.sig")):
            remote.write(remote.path(remote.layout.signatures(id) / path.name), path.read_bytes())
        for path in sorted(store.records(id).glob("*.json")):
            remote.write(remote.path(remote.layout.record(id, path.stem)), path.read_bytes())


def _push_keys(store: Store, remote: Remote, manifests: Iterable[str]) -> int:
    """Publish the keys all of whose outputs are on the remote; one that is there and leads somewhere stays."""
    pushed = set(manifests)
    count = 0
    for key in dict.fromkeys(key for id in pushed for key in _keys_of(store, id)):
        pointer = store.pointer(key)
        if pointer is None or not all(id in pushed or remote_manifest(remote, id) for id in pointer_outputs(pointer)):
            continue
        path = remote.path(remote.layout.key(key))
        data = (json.dumps(pointer.to_json(), indent=2, sort_keys=True) + "\n").encode()
        if not remote.create(path, data):
            winner = parse_pointer(remote.read(path))
            if winner is not None and all(remote_manifest(remote, id) for id in pointer_outputs(winner)):
                continue
            remote.write(path, data)
        count += 1
    return count


def _push_names(store: Store, remote: Remote, manifests: Iterable[str], report: Report) -> None:
    """Carry along every name and tag that means one of these artifacts now, unless the remote's is newer."""
    pushed = set(manifests)
    for path in sorted(store.refs.glob("*/*.json")):
        ref = names.read_json(path)
        if ref.get("id") not in pushed:
            continue
        there = f"refs/{path.parent.name}/{path.name}"
        title = f"{path.parent.name}/{names.title(names.placed(path))}"
        theirs = json_object(remote.read(there))
        if theirs.get("id") != ref["id"] and str(theirs.get("time", "")) > str(ref.get("time", "")):
            report.newer.append(title)
            continue
        if str(theirs.get("time", "")) <= str(ref.get("time", "")):
            remote.write(there, path.read_bytes())
        report.names.append(title)
