"""Pull: what the remote says is believed once every byte of it was hashed here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from llmctl.errors import BusyError, InputError
from llmctl.store import commit as protocol
from llmctl.store import names
from llmctl.store.hashing import hash_file
from llmctl.store.layout import digest_of, own_name
from llmctl.store.locks import holder, try_lock
from llmctl.store.manifest import NAME, FileEntry, Manifest
from llmctl.store.progress import Meter
from llmctl.store.reachable import input_ids
from llmctl.store.remote import Remote
from llmctl.store.roots import project_refs
from llmctl.store.store import ID, Store, is_id
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

PLAIN = re.compile(r"[^/.][^/]*\.json\Z")
"""The name of a file of the remote that may become one here."""
RECORD = re.compile(r"([0-9a-f]{64})\.json\Z")


def pull(store: Store, remote: Remote, texts: Sequence[str], *, lineage: bool, alone: bool) -> Report:
    """Copy artifacts here with the keys and names that lead to them, so that the next run finds them.

    InputError if one is not there or its bytes are not those of its manifest: nothing of it is then taken.
    """
    remote.check()
    asked = [find(remote, text) for text in texts]
    manifests = _remote_closure(remote, [id for one in asked for id in one.ids], lineage, alone)
    store.create()
    report = Report()
    with Meter("pull", sum(manifest.bytes for manifest in manifests.values())) as meter:
        for manifest in manifests.values():
            moved = _pull_one(store, remote, manifest, meter)
            (report.moved if moved else report.skipped).append(manifest)
    report.keys = sum(_pull_beside(store, remote, id) for id in manifests)
    for name in dict.fromkeys(name for one in asked for name in one.names):
        _pull_name(store, remote, name, report)
    for run in (run for one in asked for run in one.runs):
        for file in ("spec.json", "run.json"):
            data = remote.read(remote.path(remote.layout.run(run) / file))
            if data is not None and not (store.run(run) / file).exists():
                protocol.replace_json(store, store.run(run) / file, json_object(data))
    return report


def find(remote: Remote, text: str) -> Selection:
    """What `text` means on the remote: an id or its beginning, a name, a tag, `run:<id>`. InputError: not there."""
    if text.startswith("run:"):
        run = text.removeprefix("run:")
        data = remote.read(remote.path(remote.layout.run(run) / "run.json")) if RUN.match(run) else None
        if data is None:
            known = sorted({name.partition("/")[0] for name in remote.sizes("runs")})
            hint = f"the latest: {', '.join(known[-3:])}" if known else "no run was pushed there"
            raise InputError(f"there is no run {run} in {remote.uri}", hint=hint)
        if not (result := json_object(data)):
            raise InputError(f"run.json of the run {run} in {remote.uri} is damaged", hint=f"push run:{run} again")
        return Selection(ids=tuple(run_outputs(result)), runs=(run,))
    if match := names.NAME.match(text):
        there = refs_of(remote, match["pipeline"])
        found = {
            place.port: name
            for name, place in there.items()
            if (place.stage, place.tag) == (match["stage"], match["tag"] or "")
        }
        refs = {port: json_object(remote.read(f"refs/{match['pipeline']}/{name}")) for port, name in found.items()}
        refs = {port: ref for port, ref in refs.items() if is_id(ref.get("id"))}
        id = names.choose(refs, text, (), lambda: _there(remote, text), remote.uri)
        files = tuple(f"{match['pipeline']}/{found[port]}" for port, ref in refs.items() if ref["id"] == id)
        return Selection(ids=(id,), names=files)
    if (match := ID.match(text)) and len(text) >= 8:
        digits = match["digits"]
        folder = f"artifacts/sha256/{digits[:2]}"
        if len(digits) == 64:
            return Selection(ids=(f"sha256:{digits}",))
        found_ids = sorted({name.partition("/")[0] for name in remote.sizes(folder) if name.startswith(digits)})
        if len(found_ids) != 1:
            what = f"{len(found_ids)} artifacts begin with" if found_ids else "there is no artifact"
            raise InputError(f"{what} `{text}` in {remote.uri}", hint=_there(remote, text))
        return Selection(ids=(f"sha256:{found_ids[0]}",))
    raise InputError(f"`{text}` is no id, name or run", hint="sha256:<id>, PIPELINE/STAGE[.PORT][@TAG] or run:<id>")


def refs_of(remote: Remote, pipeline: str) -> dict[str, names.Place]:
    """The files of a pipeline's names on the remote, and what each of them says; other files are passed over."""
    found = {}
    for name in sorted(remote.sizes(f"refs/{pipeline}")):
        if not PLAIN.match(name):
            continue
        place = names.place(name)
        if not place.stage:
            place = place._replace(stage=str(json_object(remote.read(f"refs/{pipeline}/{name}")).get("stage", name)))
        found[name] = place
    return found


def _there(remote: Remote, text: str) -> str:
    """A hint: the names that the remote has, the nearest first."""
    known = [
        f"{folder}/{names.title(names.place(file))}"
        for folder, _, file in (path.partition("/") for path in sorted(remote.sizes("refs")))
    ]
    if not known:
        count = len({path.rpartition("/")[0] for path in remote.sizes("artifacts") if path.endswith(f"/{NAME}")})
        return f"{remote.uri} has {count} artifacts and no names" if count else f"{remote.uri} is empty"
    return names.near(text, known).replace("; `llmctl refs` lists all", "")


def _remote_closure(remote: Remote, ids: Iterable[str], lineage: bool, alone: bool) -> dict[str, Manifest]:
    found: dict[str, Manifest] = {}
    asked = list(ids)
    queue = [*asked]
    while queue:
        id = queue.pop(0)
        if id in found:
            continue
        manifest = remote_manifest(remote, id)
        if manifest is None:
            if id in asked:
                raise InputError(f"there is no whole artifact {id[:15]} in {remote.uri}", hint=_there(remote, id))
            continue  # an input from outside, or what was left behind on purpose
        found[id] = manifest
        if not alone:
            queue += [
                out
                for key in _remote_keys(remote, manifest)
                for out in pointer_outputs(parse_pointer(remote.read(remote.path(remote.layout.key(key)))))
            ]
        if lineage:
            queue += filter(is_id, input_ids(manifest.provenance))
    return found


def _remote_keys(remote: Remote, manifest: Manifest) -> list[str]:
    """The keys that lead to an artifact. A name that is none is passed over: it would become a path here."""
    first = manifest.provenance.get("key")
    found = (RECORD.match(name) for name in sorted(remote.sizes(remote.path(remote.layout.records(manifest.id)))))
    return [*([str(first)] if is_id(first) else []), *(f"sha256:{match[1]}" for match in found if match)]


def _pull_one(store: Store, remote: Remote, manifest: Manifest, meter: Meter) -> bool:
    """Fetch one artifact and commit it; False if it is here. What an earlier attempt fetched is hashed and used."""
    if protocol.intact(store.artifact(manifest.id)) is not None:
        store.use(manifest.id)
        meter(manifest.bytes)
        return False
    name = f"pull-{digest_of(manifest.id)}"
    directory = store.root / "work" / name
    lock = try_lock(store.root / "locks" / f"{name}.lock")
    if lock is None:
        who = holder(store.root / "locks" / f"{name}.lock")
        raise BusyError(f"{manifest.id[:15]} is being pulled already: {who}", hint="wait for it")
    with lock:
        directory.mkdir(parents=True, exist_ok=True)
        for left in [path for path in directory.rglob(".*") if path.is_file()]:
            left.unlink()  # the file that a killed attempt was fetching
        _fetch(remote, manifest, manifest.files, directory, meter)
        files = [file.path for file in manifest.files]
        store.commit(directory, manifest.type, files, metadata=manifest.metadata, provenance=manifest.provenance)
    return True


def _fetch(remote: Remote, manifest: Manifest, files: Sequence[FileEntry], directory: Path, meter: Meter) -> None:
    """Files of a remote artifact into a directory, each under its name once its bytes were hashed."""
    folder = remote.path(remote.layout.artifact(manifest.id))

    def fetch(file: FileEntry) -> None:
        target = directory / _safe(file.path)
        if not (target.is_file() and target.stat().st_size == file.size and hash_file(target) == file.sha256):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{own_name()}")
            try:
                remote.download(f"{folder}/{file.path}", part)
                if (digest := hash_file(part)) != file.sha256:
                    where = f"{remote.uri}/{folder}/{file.path}"
                    raise InputError(
                        f"{where} is damaged: its sha256 is {digest[:12]}, not {file.sha256[:12]}",
                        hint="`llmctl push --force` from a store that has it mends it",
                    )
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        meter(file.size)

    parallel(fetch, files)


def _safe(path: str) -> str:
    """A path of a manifest from elsewhere must stay below the artifact."""
    if path.startswith("/") or ".." in Path(path).parts or path == NAME:
        raise InputError(f"a manifest of the remote lists the path {path!r}", hint="do not use this artifact")
    return path


def _pull_beside(store: Store, remote: Remote, id: str) -> int:
    """Signatures, records and keys of an artifact that is here now; how many keys are new."""
    folder = remote.path(remote.layout.signatures(id))
    for name in remote.sizes(folder):
        data = remote.read(f"{folder}/{_safe(name)}")
        if data is not None and name.endswith(".sig") and "/" not in name:
            store.signatures(id).mkdir(parents=True, exist_ok=True)
            (store.signatures(id) / name).write_bytes(data)
    count = 0
    manifest = Manifest.read(store.artifact(id))
    for key in _remote_keys(remote, manifest):
        record = json_object(remote.read(remote.path(remote.layout.record(id, key))))
        if record and not store.record(id, key).exists() and key != manifest.provenance.get("key"):
            protocol.replace_json(store, store.record(id, key), record)
        count += _pull_key(store, remote, key)
    return count


def _pull_key(store: Store, remote: Remote, key: str) -> bool:
    """Publish a key of the remote here if it is what it says, all its outputs are here, and there is no result yet."""
    from llmctl.spec.canonical import digest

    pointer = parse_pointer(remote.read(remote.path(remote.layout.key(key))))
    if pointer is None or pointer.key != key or digest(pointer.preimage) != key or store.lookup(key) is not None:
        return False
    if any(protocol.intact(store.artifact(id)) is None for id in pointer_outputs(pointer)):
        return False
    store.publish(pointer)
    return True


def _pull_name(store: Store, remote: Remote, name: str, report: Report) -> None:
    """Let a name mean here what it means there, unless ours is newer."""
    ref = json_object(remote.read(f"refs/{name}"))
    path = store.refs / name
    if not is_id(ref.get("id")):
        return
    ours = names.read_json(path)
    kept = str(ref.get("time", "")) < str(ours.get("time", ""))
    if not kept:
        for folder in (store.refs, *project_refs(store)):
            protocol.replace_json(store, folder / name, ref)
    title = f"{path.parent.name}/{names.title(names.placed(path))}"
    (report.newer if kept and ours.get("id") != ref["id"] else report.names).append(title)


def pull_files(remote: Remote, text: str, patterns: Sequence[str], directory: Path) -> list[FileEntry]:
    """Some files of one artifact into a directory, where nothing is overwritten. InputError lists what it has."""
    remote.check()
    ids = find(remote, text).ids
    if len(ids) != 1:
        raise InputError(f"{text} means {len(ids)} artifacts, --files takes one", hint="name it by its id")
    id = ids[0]
    manifest = remote_manifest(remote, id)
    if manifest is None:
        raise InputError(f"there is no whole artifact {id[:15]} in {remote.uri}", hint=_there(remote, text))
    wanted = [file for file in manifest.files if any(fnmatch(file.path, pattern) for pattern in patterns)]
    if not wanted:
        listed = ", ".join(file.path for file in manifest.files[:12])
        raise InputError(f"{text} has no file like {' or '.join(patterns)}", hint=f"it has {listed}")
    for file in wanted:
        _check_place(directory / _safe(file.path), file)
    with Meter("pull", sum(file.size for file in wanted)) as meter:
        _fetch(remote, manifest, wanted, directory, meter)
    return wanted


def _check_place(target: Path, file: FileEntry) -> None:
    """InputError unless the file can be put there, or is there already."""
    parent = next(path for path in target.absolute().parents if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {target}: {parent} is not a writable directory", hint="choose another --output")
    same = target.is_file() and target.stat().st_size == file.size and hash_file(target) == file.sha256
    if os.path.lexists(target) and not same:
        raise InputError(
            f"{target} exists and is another file, it is not overwritten",
            hint="move it away, or choose another --output",
        )
