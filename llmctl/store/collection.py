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

from llmctl.errors import BusyError
from llmctl.store import commit as protocol
from llmctl.store import names
from llmctl.store.guard import taking
from llmctl.store.layout import digest_of, left_by_dead, remove
from llmctl.store.locks import holder, running, try_lock
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.reachable import Kept, Rules, age, input_ids, is_held, reachable, seconds
from llmctl.store.roots import Root, registered
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


def apply(store: Store, collection: Collection) -> list[Item]:
    """Take what was planned, as far as it still may go; what was taken. BusyError beside another collection."""
    path = store.root / "locks" / "gc.lock"
    lock = try_lock(path, "")
    if lock is None:
        raise BusyError(f"another garbage collection is at work: {holder(path)}", hint="wait for it")
    with lock:
        return [item for item in collection.items if _take(store, item)]


def empty_trash(store: Store, *, grace: float = 0.0) -> int:
    """Delete what has lain in the trash for `grace` seconds; how many things that were."""
    items = list(_trash(store, grace, time.time()))
    for item in items:
        remove(item.path)
    return len(items)


def release(store: Store, id: str, seen: int) -> bool:
    """Delete one artifact now, for stages whose output is `ephemeral`; whether it went.

    It stays if a name points at it, or if anybody has found it since `seen`, which `store.last_use(id)` gave.
    """
    named = [*names.every(store).values(), *(ref for project in registered(store) for ref in project.refs())]
    if id in {ref.get("id") for ref in named}:
        return False
    trash = store.trash("artifact", digest_of(id))
    with taking(store):
        if store.last_use(id) != seen or not seen:
            return False
        store.artifact(id).rename(trash)
    remove(trash)
    return True


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
        if leads_to_gone and now - path.stat().st_mtime >= rules.recent:
            yield Item(kind="key", path=path, bytes=path.stat().st_size, still=dead)


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
    needed = {id for key, m in manifests.items() if key not in gone for id in input_ids(m.provenance)}
    for path in sorted((store.root / "externals").glob("*.json")):
        if f"sha256:{path.stem}" not in needed and now - path.stat().st_mtime >= rules.recent:
            yield Item(kind="external", path=path, bytes=path.stat().st_size, still=lambda: True, final=True)


# -- work in progress -------------------------------------------------------------------------------------------------


class _Work:
    """The requests, work directories and locks of a store, and whether what they are for is done."""

    def __init__(self, store: Store, rules: Rules, gone: set[str], now: float) -> None:
        self._store = store
        self._rules = rules
        self._now = now
        self._gone = gone
        self._requests = [
            (path, request)
            for path in sorted((store.root / "requests").glob("*/*.json"), key=lambda path: path.stat().st_mtime)
            if (request := names.read_json(path)).keys() >= {"key", "resume"}
        ]
        self._latest = {digest_of(str(request["resume"])): str(request["key"]) for _, request in self._requests}

    def directories(self) -> Iterator[Item]:
        """`work/` of finished keys, and of unfinished ones that nobody has touched for long."""
        for path in sorted((self._store.root / "work").glob("*")):
            lock = self._store.root / "locks" / f"{path.name}.lock"
            if running(lock) is not None:
                continue
            finished = self._finished(self._latest.get(path.name.partition(".")[0], ""))
            if finished or self._now - newest(path) >= self._rules.unfinished:
                yield Item(
                    kind="work", path=path, bytes=size(path), still=path.exists, lock=lock,
                    type="finished" if finished else "unfinished",
                )  # fmt: skip

    def requests(self) -> Iterator[Item]:
        """Requests that are done with: nothing will read them again."""
        for path, request in self._requests:
            pointer = self._store.pointer(str(request["key"]))
            limit = self._rules.unfinished if pointer is None else self._rules.recent
            resume = str(request["resume"])

            def idle(resume: str = resume) -> bool:
                return not is_held(self._store, resume)

            if self._now - path.stat().st_mtime >= limit and idle():
                yield Item(kind="request", path=path, bytes=path.stat().st_size, still=idle)

    def locks(self) -> Iterator[Item]:
        """Files of locks that nobody holds and that guard nothing."""
        for path in sorted((self._store.root / "locks").glob("*.lock")):
            work = self._store.root / "work" / path.name.removesuffix(".lock")
            free = running(path) is None and not work.exists() and path.name != "gc.lock"
            if free and self._now - path.stat().st_mtime >= self._rules.recent:
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
        with contextlib.suppress(FileNotFoundError):
            if path in dead or now - newest(path) >= rules.unfinished:
                yield Item(kind="tmp", path=path, bytes=size(path), still=path.exists, final=True)


def _trash(store: Store, grace: float, now: float) -> Iterator[Item]:
    for path in sorted((store.root / "trash").glob("*")):
        with contextlib.suppress(FileNotFoundError):
            stamp = path.name.partition("--")[0]
            thrown = _stamped(stamp) or path.stat().st_ctime
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
    """When anything at or below `path` was last changed."""
    return max((status.st_mtime for status in _stats(path)), default=0.0)


def _stats(path: Path) -> Iterator[os.stat_result]:
    for found in (path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())):
        with contextlib.suppress(FileNotFoundError):
            yield found.lstat()
