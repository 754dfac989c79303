"""What a file system or a remote can do, found out by doing it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import LlmctlError
from llmctl.store.copying import can_clone
from llmctl.store.hashing import sync
from llmctl.store.layout import Layout
from llmctl.store.remote import Remote


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One ability. `needed`: without it results may be wrong or cannot be kept."""

    name: str
    ok: bool
    needed: bool
    note: str = ""


def probe_local(layout: Layout) -> list[Probe]:
    """Try the file system of a local store in a directory of its own under `tmp/`."""
    here = layout.staging()
    try:
        return [
            _probe(
                "a directory is renamed in one step",
                lambda: _rename(here),
                True,
                "artifacts could be seen half-written",
            ),
            _probe(
                "no directory replaces a full one", lambda: _occupied(here), True, "two writers could mix their files"
            ),
            _probe(
                "files and directories are forced to disk", lambda: _sync(here), True, "a power cut may lose results"
            ),
            _probe("a link is made only once", lambda: _link(here), False, "of two results of one key the last wins"),
            _probe(
                "flock excludes", lambda: _flock(here), False, "two runs may do the same work, and gc must run alone"
            ),
            _probe("times are kept to the second or finer", lambda: _times(here), True, "gc cannot see what was used"),
            _probe(
                "upper and lower case differ", lambda: _case(here), False, "stages whose ids differ by case collide"
            ),
            _probe(
                "copies share their blocks",
                lambda: can_clone(here),
                False,
                "copies out of the store take their full size",
            ),
        ]
    finally:
        shutil.rmtree(here, ignore_errors=True)


def probe_remote(remote: Remote) -> list[Probe]:
    """Try a remote under `tmp/`: write, read, list, replace, exclusive create, delete."""
    folder = f"tmp/check-{uuid.uuid4().hex}"
    first, second = f"{folder}/first", f"{folder}/second"

    def read_after_write() -> bool:
        remote.write(first, b"one")
        return remote.read(first) == b"one"

    def replaced() -> bool:
        remote.write(first, b"three")
        return remote.read(first) == b"three"

    def exclusive() -> bool:
        return remote.create(second, b"one") and not remote.create(second, b"two") and remote.read(second) == b"one"

    def deleted() -> bool:
        for path in (first, second):
            remote.delete(path)
        return remote.read(first) is None and remote.sizes(folder) == {}

    try:
        return [
            _probe("what was written can be read at once", read_after_write, True, "push cannot tell what is there"),
            _probe(
                "a listing shows it, with its size",
                lambda: remote.sizes(folder) == {"first": 3},
                True,
                "push cannot tell what is there",
            ),
            _probe("a file can be replaced", replaced, True, "names cannot move"),
            _probe("a file is created only once", exclusive, False, "of two results of one key the last wins"),
            _probe("a file can be deleted", deleted, True, "a damaged artifact cannot be mended"),
        ]
    finally:
        for path in (first, second):
            with contextlib.suppress(LlmctlError):
                remote.delete(path)


def _probe(name: str, work: Callable[[], bool], needed: bool, without: str) -> Probe:
    """`without` says what it means if the ability is missing."""
    try:
        ok, why = work(), ""
    except (OSError, LlmctlError) as error:
        ok, why = False, f" ({error.message if isinstance(error, LlmctlError) else error.strerror})"
    return Probe(name=name, ok=ok, needed=needed, note="" if ok else f"{without}{why}")


def _rename(here: Path) -> bool:
    (here / "a").mkdir()
    (here / "a/file").write_text("x")
    (here / "a").rename(here / "b")
    return (here / "b/file").read_text() == "x" and not (here / "a").exists()


def _occupied(here: Path) -> bool:
    (here / "c").mkdir()
    (here / "c/file").write_text("y")
    try:
        (here / "c").rename(here / "b")
    except OSError:
        return (here / "b/file").read_text() == "x"
    return False


def _sync(here: Path) -> bool:
    sync(here / "b/file")
    sync(here)
    return True


def _link(here: Path) -> bool:
    (here / "one").write_text("1")
    os.link(here / "one", here / "two")
    try:
        os.link(here / "one", here / "two")
    except FileExistsError:
        return True
    return False


def _flock(here: Path) -> bool:
    path = here / "lock"
    first, second = os.open(path, os.O_RDWR | os.O_CREAT), os.open(path, os.O_RDWR)
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
    finally:
        os.close(first)
        os.close(second)


def _times(here: Path) -> bool:
    os.utime(here / "b", (1_000_000_001, 1_000_000_001))
    return int((here / "b").stat().st_mtime) == 1_000_000_001


def _case(here: Path) -> bool:
    (here / "Case").write_text("x")
    return not (here / "cASE").exists()
