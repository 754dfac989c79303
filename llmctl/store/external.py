"""Inputs from outside the store: which files they are, their content ids, and whether they changed since.

A file is hashed once: digests are kept by (path, device, inode, size, mtime, ctime), and trusted only if the file was
at rest for two seconds when it was hashed (git's rule for racy timestamps).
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.store import types
from llmctl.store.hashing import hash_files
from llmctl.store.layout import Layout
from llmctl.store.manifest import NAME, BadManifest, FileEntry, Manifest, content_id, sort_files
from llmctl.store.names import read_json

RACY_NS = 2_000_000_000
MAGIC = frozenset("*?[")
TABLE = "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, stat TEXT, sha256 TEXT, hashed INTEGER)"


@dataclass(frozen=True)
class Snapshot:
    """The files of an external input as they were when it was read; `changed` compares with now."""

    path: Path
    stats: Mapping[str, str]

    def changed(self) -> str:
        """The first file that is new, gone or different, empty if all is as it was."""
        try:
            now = {name: _fingerprint(path.stat()) for name, path in list_files(self.path).items()}
        except (OSError, InputError):
            return str(self.path)
        names = sorted(set(now) | set(self.stats))
        different = next((name for name in names if now.get(name) != self.stats.get(name)), "")
        return str(self.path if self.path.is_file() else self.path / different) if different else ""

    def to_json(self) -> dict[str, Any]:
        """For the request of a stage."""
        return {"path": str(self.path), "stats": dict(self.stats)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Snapshot:
        """The reverse of `to_json`."""
        return cls(Path(raw["path"]), dict(raw["stats"]))


@dataclass(frozen=True)
class External:
    """An external input: what the stage receives, and how to see whether it has changed since."""

    artifact: Artifact
    snapshot: Snapshot


def expand(path: Path) -> list[Path]:
    """A path itself if it exists, else the files of a glob, sorted; hidden ones only where the pattern names them."""
    if path.exists():
        return [path]
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if MAGIC & set(part)), None)
    if first is None:
        return []
    base, pattern = Path(*parts[:first]), Path(*parts[first:])
    if not base.is_dir():
        return []
    hidden = any(part.startswith(".") for part in pattern.parts)
    try:
        found = [file for file in base.glob(str(pattern)) if file.is_file()]
    except ValueError as error:  # `**.md`: two stars stand for directories and alone
        raise InputError(f"{path} is no pattern: {error}", hint="as in notes/**/*.md") from None
    return sorted(file for file in found if hidden or not _hidden(file.relative_to(base)))


def list_files(path: Path) -> dict[str, Path]:
    """Files of an input by name: a file by its own name, those below a directory but hidden ones and the manifest."""
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise InputError(f"no such file or directory: {path}")
    found = {}
    for file in path.rglob("*"):
        relative = file.relative_to(path)
        if not _hidden(relative) and file.is_file() and str(relative) != NAME:
            found[relative.as_posix()] = file
    return dict(sorted(found.items()))


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def read_external(
    layout: Layout, path: Path, accepted: Sequence[str], name: str = "", *, pinned: str = "", origin: str = ""
) -> External:
    """The file or directory `path` as an artifact of one of the `accepted` types (any type if there are none).

    `name` is how a single file is called in the content id. `pinned` is an id that is taken on trust: nothing is
    hashed. `origin` is noted as the place it came from where that is not `path`. Raises InputError: missing, empty, of
    another type, or an artifact whose bytes are no longer those of its manifest.
    """
    manifest = _manifest(path)
    if manifest and list(accepted) == ["tokenizer"] and manifest.type.startswith("model."):
        manifest = None  # a model brings its tokenizer along: the directory is taken as the tokenizer that it holds too
    if manifest and accepted and manifest.type not in accepted:
        raise InputError(
            f"{path} is a {manifest.type}, wanted {' or '.join(accepted)}", hint="check which input it is for"
        )
    type = manifest.type if manifest else _choose(path, accepted)
    files = list_files(path)
    if not files:
        raise InputError(f"{path} is empty")
    metadata = _checked(type, path)
    stats = {file: _fingerprint(found.stat()) for file, found in files.items()}
    if pinned:
        return External(Artifact(path, type, pinned, metadata), Snapshot(path, stats))
    digests = DigestCache(layout).digests(list(files.values()))
    rows = [
        FileEntry(name if name and path.is_file() else file, files[file].stat().st_size, digest)
        for file, digest in zip(files, digests, strict=True)
    ]
    if manifest:
        _compare(path, manifest, rows)
        id, metadata = manifest.id, dict(manifest.metadata)
    else:
        id = content_id(type, sort_files(rows))
        note_external(layout, id, type, origin or str(path), rows)
    return External(Artifact(path, type, id, metadata), Snapshot(path, stats))


MOST_FILES = 10_000
"""Files of one input that are noted by name; of more, only their number is."""


def note_external(layout: Layout, id: str, type: str, origin: str, rows: Sequence[FileEntry]) -> None:
    """Remember where an input was and which files it had, for `lineage` and `why`; never part of a key or an artifact.

    A note that cannot be written (no store yet, disk full) is no error.
    """
    target = layout.external(id)
    if not (layout.root / "store.json").exists() or read_note(layout, id).get("path") == origin:
        return
    listed = [{"path": row.path, "size": row.size, "sha256": row.sha256} for row in rows[:MOST_FILES]]
    note = {"id": id, "type": type, "path": origin, "count": len(rows), "files": listed}
    with contextlib.suppress(OSError):
        target.parent.mkdir(exist_ok=True)
        temporary = layout.temporary()
        temporary.write_text(json.dumps(note))  # not forced to disk: one of thousands, and easily made again
        temporary.replace(target)


def read_note(layout: Layout, id: str) -> dict[str, Any]:
    """What `note_external` has remembered: path, type, files; empty if nothing."""
    return read_json(layout.external(id))


def changed_since(layout: Layout, id: str) -> list[str]:
    """Which files of an input from outside are no longer those that were read, a line each; empty if all are.

    They are looked for where the input lay; of a place that is no path, such as `hf://`, nothing can be said. Of more
    than `MOST_FILES` files only whether all are the same.
    """
    note = read_note(layout, id)
    origin, listed = str(note.get("path", "")), list(note.get("files") or ())
    if not origin or "://" in origin:
        return []
    if len(listed) != note.get("count"):
        return _changed_as_a_whole(Path(origin), str(note.get("type")), id)
    then = [FileEntry(row["path"], row["size"], row["sha256"]) for row in listed]
    if content_id(str(note.get("type")), sort_files(then)) != id:
        return [f"{layout.external(id)} is damaged: its files are not those of {id[:15]}"]
    place = Path(origin)
    try:
        files = list_files(place)
    except InputError:
        return [f"{place} is missing"]
    if place.is_file():  # its name within the id may be another
        files = {then[0].path: place}
    found = []
    for row in then:
        path = files.pop(row.path, None)
        if path is None:
            found.append(f"{place / row.path} is missing")
        elif path.stat().st_size != row.size or hash_files([path]) != [row.sha256]:
            found.append(f"{path} has changed since it was read")
    return found + [f"{path} is new since then" for path in files.values()]


def _changed_as_a_whole(place: Path, type: str, id: str) -> list[str]:
    """`changed_since` for a directory whose files were not all noted."""
    try:
        files = list_files(place)
    except InputError:
        return [f"{place} is missing"]
    digests = hash_files(list(files.values()))
    rows = [FileEntry(file, files[file].stat().st_size, digest) for file, digest in zip(files, digests, strict=True)]
    return [] if content_id(type, sort_files(rows)) == id else [f"{place} has changed since it was read"]


def _manifest(path: Path) -> Manifest | None:
    if not path.is_dir():
        return None
    try:
        return Manifest.read(path)
    except FileNotFoundError:
        return None
    except (BadManifest, OSError) as error:
        raise InputError(
            f"{path / NAME} is damaged: {error}", hint=f"delete {NAME} to use the files as they are"
        ) from None


def _choose(path: Path, accepted: Sequence[str]) -> str:
    """The one accepted type, or that among several which the files look like; a bare guess if any is welcome."""
    if len(accepted) == 1:
        return accepted[0]
    guessed = types.guess(path, accepted)
    if not accepted or guessed in accepted:
        return guessed
    looks = f", it looks like {guessed}" if guessed != "files" else ""
    raise InputError(f"{path} is none of {', '.join(accepted)}{looks}", hint="check which input it was given to")


def _checked(type: str, path: Path) -> dict[str, Any]:
    try:
        return types.check(type, path)
    except types.Unfit as error:
        guessed = types.guess(path)
        looks = f"it looks like {guessed}" if guessed not in ("files", type) else f"a {type} is needed here"
        raise InputError(f"{path} is no {type}: {error}", hint=looks) from error


def _compare(path: Path, manifest: Manifest, rows: Sequence[FileEntry]) -> None:
    """An edited copy must not pass for the artifact that its manifest names."""
    now = {row.path: row for row in rows}
    for file in manifest.files:
        found = now.pop(file.path, None)
        if found != file:
            what = "is missing" if found is None else "is damaged: its bytes are not those of its manifest"
            raise InputError(
                f"{path / file.path} {what}", hint=f"restore it, or delete {path / NAME} to use the files as they are"
            )
    if now:
        raise InputError(
            f"{path / next(iter(now))} does not belong to the artifact",
            hint=f"remove it, or delete {path / NAME} to use the files as they are",
        )


def _fingerprint(status: Any) -> str:
    """What changes when a file does; directories and devices never are inputs."""
    if not stat.S_ISREG(status.st_mode):
        raise InputError("an input is no regular file")
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


class DigestCache:
    """Digests of files that did not change since; a cache that cannot be used (disk full, locked) is no error."""

    def __init__(self, layout: Layout) -> None:
        self._path = layout.digests

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """Hexadecimal sha256 of every file, in order."""
        names = [str(path.absolute()) for path in paths]
        stats = [path.stat() for path in paths]
        known = self._known(names)
        found = [self._match(known.get(name), status) for name, status in zip(names, stats, strict=True)]
        missing = [index for index, digest in enumerate(found) if digest is None]
        fresh = dict(zip(missing, hash_files([paths[index] for index in missing]), strict=True))
        now = time.time_ns()
        self._store([(names[i], _fingerprint(stats[i]), digest, now) for i, digest in fresh.items()])
        return [digest or fresh[index] for index, digest in enumerate(found)]

    def _match(self, row: tuple[str, str, int] | None, status: Any) -> str | None:
        if row is None or row[0] != _fingerprint(status):
            return None
        at_rest = max(status.st_mtime_ns, status.st_ctime_ns) + RACY_NS < row[2]
        return row[1] if at_rest else None

    def _known(self, names: Sequence[str]) -> dict[str, tuple[str, str, int]]:
        known: dict[str, tuple[str, str, int]] = {}
        with contextlib.suppress(sqlite3.Error), self._open() as database:
            for name in names:
                row = database.execute("SELECT stat, sha256, hashed FROM digests WHERE path = ?", (name,)).fetchone()
                if row:
                    known[name] = row
        return known

    def _store(self, rows: Sequence[tuple[str, str, str, int]]) -> None:
        if rows and self._path.parent.is_dir():
            with contextlib.suppress(sqlite3.Error), self._open() as database:
                database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", rows)
                database.commit()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if not self._path.parent.is_dir():
            raise sqlite3.OperationalError("no store yet")
        database = sqlite3.connect(self._path, timeout=10)
        try:
            database.execute(TABLE)
            yield database
        finally:
            database.close()
