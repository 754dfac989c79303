"""Garbage collection: what nothing needs any more is moved to `trash/`, and deleted from there after a while.

Everything is decided first and looked at again, alone and under a lock, when its turn comes. Each thing goes in one
`rename`, so that a collection that is killed has taken some things and left the others whole. An artifact that somebody
has found in the meantime stays (`llmctl.store.guard`); a key whose artifact has gone is a miss, never an error.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import BusyError
from llmctl.store import commit as protocol
from llmctl.store import names
from llmctl.store.guard import taking
from llmctl.store.layout import digest_of, left_by_dead, remove
from llmctl.store.locks import Lock, holder, running, try_lock
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.reachable import (
    Kept,
    Rules,
    age,
    input_ids,
    is_held,
    modified,
    reachable,
    request_ids,
    requests,
    seconds,
    untouched,
)
from llmctl.store.roots import Root, may_own_names, own_folder, registered
from llmctl.store.store import Pointer, Store


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that would go. `still()` says whether it may when its turn has come."""

    kind: str
    path: Path
    bytes: int
    still: Callable[[], bool] = field(repr=False)
    id: str = ""
    type: str = ""
    stage: str = ""
    final: bool = False
    """Deleted at once instead of moved to the trash: it is trash already, or was never finished by anybody."""
    lock: Path | None = None
    """Held while it goes, and goes with it; who works there keeps it."""


@dataclass(kw_only=True)
class Collection:
    """What a collection would take, and what it leaves."""

    items: list[Item]
    kept: int
    """Artifacts that stay."""
    projects: list[Root]

    @property
    def bytes(self) -> int:
        """Size of all that would go."""
        return sum(item.bytes for item in self.items)


def plan(store: Store, rules: Rules, *, grace: float, now: float | None = None) -> Collection:
    """Decide what nothing needs. Trash older than `grace` seconds is part of it. Touches nothing."""
    now = time.time() if now is None else now
    manifests: dict[str, Manifest] = {}
    for directory in store.directories():
        with contextlib.suppress(OSError, BadManifest):
            manifests[f"sha256:{directory.name}"] = Manifest.read(directory)
    kept = reachable(store, rules, manifests, now)
    artifacts = list(_artifacts(store, rules, manifests, kept, now))
    gone = {item.id for item in artifacts}
    work = _Work(store, rules, gone, now)
    items = [
        *artifacts, *_keys(store, rules, gone, now), *_beside(store, gone), *work.directories(), *work.requests(),
        *work.locks(), *_runs(store, kept), *_externals(store, rules, manifests, gone, now), *_tmp(store, rules, now),
        *_trash(store, grace, now),
    ]  # fmt: skip
    return Collection(items=items, kept=len(store.directories()) - len(artifacts), projects=registered(store))


def collect(store: Store, rules: Rules, *, grace: float) -> Collection:
    """Plan and take, beside no other collection from first to last; what was taken. BusyError beside another."""
    with _alone(store):
        found = plan(store, rules, grace=grace)
        found.items = [item for item in found.items if _take(store, item)]
    return found


def apply(store: Store, collection: Collection) -> list[Item]:
    """Take what was planned, as far as it still may go; what was taken. BusyError beside another collection."""
    with _alone(store):
        return [item for item in collection.items if _take(store, item)]


def _alone(store: Store) -> Lock:
    path = store.root / "locks" / "gc.lock"
    lock = try_lock(path, "")
    if lock is None:
        raise BusyError(f"another garbage collection is at work: {holder(path)}", hint="wait for it")
    return lock


def empty_trash(store: Store, *, grace: float = 0.0) -> int:
    """Delete what has lain in the trash for `grace` seconds; how many things that were."""
    items = list(_trash(store, grace, time.time()))
    for item in items:
        remove(item.path)
    return len(items)


def release(store: Store, id: str, seen: int, *, stage: str = "", key: str = "") -> bool:
    """Move one artifact to the trash now, for stages whose output is `ephemeral`; whether it went.

    It stays if a name points at it, other than the latest ones of `stage` (`PIPELINE/STAGE`) in this project; if
    another key than `key` leads to it; if a stage at work was given it; or if anybody has found it since `seen`, which
    `store.last_use(id)` gave.
    """
    if _is_named(store, id, stage) or _is_result(store, id, key):
        return False
    if any(id in request_ids(request) and is_held(store, str(request["resume"])) for request in requests(store)):
        return False
    with taking(store), contextlib.suppress(FileNotFoundError):  # somebody else was faster
        if seen and store.last_use(id) == seen:
            store.artifact(id).rename(store.trash("artifact", digest_of(id)))
            return True
    return False


def _is_named(store: Store, id: str, stage: str) -> bool:
    """Whether a name holds the artifact: any of another project, one of this project's if it is not `stage`'s latest.

    What `refs/` says is also in the folder of the project that said it; not so in a project's own store, where others
    cannot tell whose the names are.
    """
    own = own_folder(store)
    if not may_own_names(store) and id in {ref.get("id") for ref in names.every(store).values()}:
        return True
    named = list(names.every(store).items())
    named += [item for root in registered(store) if root.folder == own for item in names.every_in(root.folder).items()]
    if any(ref.get("id") == id and not (name.startswith(f"{stage}.") and "@" not in name) for name, ref in named):
        return True
    return any(ref.get("id") == id for root in registered(store) if root.folder != own for ref in root.refs())


def _is_result(store: Store, id: str, key: str) -> bool:
    """Whether another key than `key` leads to the artifact; a damaged one leads nowhere."""
    for path in (store.root / "keys").glob("*/*.json"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.stem != digest_of(key) and id in path.read_text(encoding="utf-8"):
                pointer = Pointer.read(path)
                if pointer is not None and id in pointer.outputs.values():
                    return True
    return False


def _take(store: Store, item: Item) -> bool:
    with contextlib.ExitStack() as stack:
        if item.lock is not None:
            lock = try_lock(item.lock)
            if lock is None:
                return False
            stack.enter_context(lock)
        if item.kind in ("artifact", "key", "record"):
            stack.enter_context(taking(store))
        try:
            if not item.still():
                return False
            if not item.final:
                item.path.rename(store.trash(item.kind, item.path.name))
        except FileNotFoundError:
            return False
        if item.lock is not None:
            item.lock.unlink(missing_ok=True)
    if item.final and item.path != item.lock:
        remove(item.path)
    return True


# -- artifacts and what belongs to them -------------------------------------------------------------------------------


def _artifacts(store: Store, rules: Rules, manifests: dict[str, Manifest], kept: Kept, now: float) -> Iterator[Item]:
    for directory in store.directories():
        id = f"sha256:{directory.name}"
        manifest = manifests.get(id)

        def old(directory: Path = directory, manifest: Manifest | None = manifest) -> bool:
            return age(directory, manifest, max(now, time.time())) >= rules.recent

        if id not in kept.ids and old():
            yield Item(
                kind="artifact",
                path=directory,
                bytes=manifest.bytes if manifest else size(directory),
                still=old,
                id=id,
                type=manifest.type if manifest else "damaged",
                stage=str(manifest.provenance.get("stage", "")) if manifest else "",
            )


def _keys(store: Store, rules: Rules, gone: set[str], now: float) -> Iterator[Item]:
    """Keys that lead to nothing."""
    for path in sorted((store.root / "keys").glob("*/*.json")):

        def dead(path: Path = path) -> bool:
            pointer = Pointer.read(path)
            return pointer is None or any(not store.artifact(id).is_dir() for id in pointer.outputs.values())

        pointer = Pointer.read(path)
        leads_to_gone = dead() or (pointer is not None and gone & set(pointer.outputs.values()))
        if leads_to_gone and untouched(path, now) >= rules.recent:
            yield Item(kind="key", path=path, bytes=size(path), still=dead)


def _beside(store: Store, gone: set[str]) -> Iterator[Item]:
    """Records and signatures of artifacts that are not there."""
    for kind, folder in (("record", "records"), ("signature", "signatures")):
        for path in sorted((store.root / folder).glob("*")):
            id = f"sha256:{path.name}"

            def orphan(id: str = id) -> bool:
                return not store.artifact(id).is_dir()

            if orphan() or id in gone:
                yield Item(kind=kind, path=path, bytes=size(path), still=orphan)


def _externals(
    store: Store, rules: Rules, manifests: dict[str, Manifest], gone: set[str], now: float
) -> Iterator[Item]:
    """Notes on files from outside that nothing in the store was made from."""
    needed = {id for request in requests(store) for id in request_ids(request)}
    for id, manifest in manifests.items():
        if id not in gone:
            records = (names.mapping(names.read_json(path).get("provenance")) for path in _records(store, id))
            needed.update(id for origin in (manifest.provenance, *records) for id in input_ids(origin))
    for path in sorted((store.root / "externals").glob("*.json")):

        def old(path: Path = path) -> bool:
            return untouched(path, max(now, time.time())) >= rules.recent

        if f"sha256:{path.stem}" not in needed and untouched(path, now) >= rules.recent:
            yield Item(kind="external", path=path, bytes=size(path), still=old, final=True)


def _records(store: Store, id: str) -> Iterator[Path]:
    return store.records(id).glob("*.json")


# -- work in progress -------------------------------------------------------------------------------------------------


class _Work:
    """The requests, work directories and locks of a store, and whether what they are for is done."""

    def __init__(self, store: Store, rules: Rules, gone: set[str], now: float) -> None:
        self._store = store
        self._rules = rules
        self._now = now
        self._gone = gone
        self._read: dict[Path, tuple[float, dict[str, Any]]] = {}

    def _requests(self) -> list[tuple[Path, dict[str, Any]]]:
        """All requests, the latest last. Only those are read that are new since the last time."""
        for path in (self._store.root / "requests").glob("*/*.json"):
            stamp = modified(path)
            if stamp is not None and self._read.get(path, (None,))[0] != stamp:
                self._read[path] = (stamp, names.read_json(path))
        rows = sorted(self._read.items(), key=lambda row: row[1][0])
        return [(path, request) for path, (_, request) in rows if request.keys() >= {"key", "resume"}]

    def _state(self, path: Path, now: float) -> str:
        """`finished` if the latest request for this work is done, `unfinished` if nobody has touched it for long."""
        resume = path.name.partition(".")[0]
        keys = [str(request["key"]) for _, request in self._requests() if digest_of(str(request["resume"])) == resume]
        if keys and self._finished(keys[-1]):
            return "finished"
        return "unfinished" if now - (newest(path) or now) >= self._rules.unfinished else ""

    def directories(self) -> Iterator[Item]:
        """`work/` of finished keys, and of unfinished ones that nobody has touched for long."""
        for path in sorted((self._store.root / "work").glob("*")):
            lock = self._store.root / "locks" / f"{path.name}.lock"
            if running(lock) is not None:
                continue
            if state := self._state(path, self._now):

                def same(path: Path = path, state: str = state) -> bool:
                    return path.exists() and self._state(path, max(self._now, time.time())) == state

                yield Item(kind="work", path=path, bytes=size(path), still=same, lock=lock, type=state)

    def requests(self) -> Iterator[Item]:
        """Requests that are done with: nothing will read them again."""
        for path, request in self._requests():
            pointer = self._store.pointer(str(request["key"]))
            limit = self._rules.unfinished if pointer is None else self._rules.recent
            resume = str(request["resume"])

            def idle(resume: str = resume) -> bool:
                return not is_held(self._store, resume)

            if untouched(path, self._now) >= limit and idle():
                yield Item(kind="request", path=path, bytes=size(path), still=idle)

    def locks(self) -> Iterator[Item]:
        """Files of locks that nobody holds and that guard nothing."""
        for path in sorted((self._store.root / "locks").glob("*.lock")):
            work = self._store.root / "work" / path.name.removesuffix(".lock")
            free = running(path) is None and not work.exists() and path.name != "gc.lock"
            if free and untouched(path, self._now) >= self._rules.recent:
                yield Item(kind="lock", path=path, bytes=0, still=lambda: True, final=True, lock=path)

    def _finished(self, key: str) -> bool:
        pointer = self._store.pointer(key) if key else None
        if pointer is None:
            return False
        return all(protocol.intact(self._store.artifact(id)) for id in pointer.outputs.values())


# -- the rest ---------------------------------------------------------------------------------------------------------


def _runs(store: Store, kept: Kept) -> Iterator[Item]:
    for path in sorted((store.root / "runs").glob("*")):
        if path.name not in kept.runs:
            yield Item(kind="run", path=path, bytes=size(path), still=path.exists)


def _tmp(store: Store, rules: Rules, now: float) -> Iterator[Item]:
    """What dead processes left; of other hosts, whose processes cannot be seen, what is old."""
    dead = set(left_by_dead(store.root / "tmp"))
    for path in sorted((store.root / "tmp").glob("*")):
        if path in dead or now - (newest(path) or now) >= rules.unfinished:
            yield Item(kind="tmp", path=path, bytes=size(path), still=path.exists, final=True)


def _trash(store: Store, grace: float, now: float) -> Iterator[Item]:
    for path in sorted((store.root / "trash").glob("*")):
        thrown = _stamped(path.name.partition("--")[0]) or modified(path) or now
        if now - thrown >= grace:
            yield Item(kind="trash", path=path, bytes=size(path), still=path.exists, final=True)


def _stamped(text: str) -> float:
    if len(text) != 16:
        return 0.0
    return seconds(f"{text[:4]}-{text[4:6]}-{text[6:11]}:{text[11:13]}:{text[13:]}")


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; what vanishes meanwhile counts nothing."""
    return sum(status.st_size for status in _stats(path) if stat.S_ISREG(status.st_mode))


def newest(path: Path) -> float:
    """When anything at or below `path` was last changed; 0 if it is gone."""
    return max((status.st_mtime for status in _stats(path)), default=0.0)


def _stats(path: Path) -> Iterator[os.stat_result]:
    below = (Path(folder) / name for folder, names, files in os.walk(path) for name in (*names, *files))
    for found in (path, *below) if not path.is_symlink() else (path,):
        with contextlib.suppress(OSError):
            yield found.lstat()
