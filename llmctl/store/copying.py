"""Copy an artifact out of the store: real copies, never links, put in place in one step."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from pathlib import Path

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.store.hashing import hash_file, plain_files
from llmctl.store.layout import ENVIRONMENT, HOME, is_store, own_name, sweep_dead
from llmctl.store.manifest import NAME, BadManifest, FileEntry, Manifest, content_id

FICLONE = 0x40049409
"""Linux ioctl: share the blocks of another file (btrfs, xfs); ext4 refuses, then bytes are copied."""


def materialise(artifact: Artifact, target: Path, *, force: bool = False) -> None:
    """Put a copy of `artifact` at `target`; an older artifact there is replaced in one step.

    What a copy that was killed has left beside it is removed. InputError if something else is there, or an artifact
    that was changed since, unless `force`; and whatever `force` says, for a place whose loss would be a disaster.
    """
    check_target(target, force=force)
    if artifact.path.resolve().is_relative_to(_real(target)):
        raise InputError(f"{target} holds the artifact itself", hint="choose another directory")
    if not force and (changed := changes(target)):
        raise InputError(
            f"{target} was changed since llmctl wrote it: {changed[0]}",
            hint="move it away, or choose another directory; `llmctl get --force` replaces it all the same",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        sweep_dead(target.parent, f".{target.name}-")
    _replace(artifact, target)
    sweep_dead(target.parent, f".{target.name}-")


def _replace(artifact: Artifact, target: Path) -> None:
    """Whatever fails, what was at `target` is there again."""
    fresh = target.with_name(f".{target.name}-{own_name()}")
    old = fresh.with_name(fresh.name + "-old")
    try:
        fresh.mkdir()
        for name in [*plain_files(artifact.path), NAME]:
            if (artifact.path / name).exists():
                _copy(artifact.path / name, fresh / name)
        if os.path.lexists(target):
            target.rename(old)
        try:
            fresh.rename(target)
        except BaseException:
            if os.path.lexists(old):
                old.rename(target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def copy_signatures(folder: Path, target: Path) -> None:
    """Put the signatures in `folder` into `<target>.signatures/`, in place of those of whatever was there before."""
    beside = target.with_name(target.name + ".signatures")
    for old in beside.glob("*.sig"):
        old.unlink()
    for path in sorted(folder.glob("*.sig")):
        beside.mkdir(exist_ok=True)
        shutil.copy(path, beside / path.name)
    if beside.is_dir() and not any(beside.iterdir()):
        beside.rmdir()


def check_target(target: Path, *, force: bool = False) -> None:
    """Refuse to replace what llmctl did not write, and a place that cannot be written.

    Whatever `force` says: a directory that holds a store, the current directory or the home, and a place in a store.
    """
    _check_harmless(target)
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"cannot write {target}: {parent} is not a writable directory", hint="choose another directory"
        )
    if force or not os.path.lexists(target) or (target / NAME).is_file():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise InputError(
        f"{target} exists and is no llmctl artifact, it is not replaced",
        hint="move it away or choose another directory",
    )


def _check_harmless(target: Path) -> None:
    real = _real(target)
    hint = "choose another directory"
    for path, what in ((Path.cwd(), "the current directory"), (Path.home(), "your home directory")):
        if path.resolve().is_relative_to(real):
            raise InputError(f"{target} is not replaced: {what} is in it", hint=hint)
    for store in (real, real / "store", real / HOME / "store", Path(os.environ.get(ENVIRONMENT) or real).expanduser()):
        if is_store(store) and store.resolve().is_relative_to(real):
            raise InputError(f"{target} is not replaced: the store {store} is in it", hint=hint)
    if (around := next((parent for parent in real.parents if is_store(parent)), None)) is not None:
        raise InputError(f"{target} lies in the store {around}, which only llmctl writes", hint=hint)


def _real(target: Path) -> Path:
    """Where the entry `target` lies; it may be a link itself, which is then what is replaced."""
    return target.parent.resolve() / target.name if target.name not in ("", "..") else target.resolve()


def changes(directory: Path) -> list[str]:
    """What of an artifact's copy would be lost with it: files that differ from its manifest or are not in it.

    Every file is hashed. Hidden files count, missing ones do not; empty for what is no artifact.
    """
    try:
        manifest = Manifest.read(directory)
    except (OSError, BadManifest):
        return []
    if content_id(manifest.type, manifest.files, manifest.type_version) != manifest.id:
        return [f"{NAME} is not as it was"]
    listed = {file.path: file for file in manifest.files}
    found = []
    for folder, directories, files in os.walk(directory):
        links = [name for name in directories if (Path(folder) / name).is_symlink()]
        for path in (Path(folder) / name for name in sorted([*files, *links])):
            name = path.relative_to(directory).as_posix()
            if name != NAME and (what := _change(path, listed.get(name))):
                found.append(f"{name} {what}")
    return found


def _change(path: Path, file: FileEntry | None) -> str:
    if file is None:
        return "does not belong to the artifact"
    status = path.lstat()
    same = stat.S_ISREG(status.st_mode) and status.st_size == file.size and hash_file(path) == file.sha256
    return "" if same else "differs from the artifact's"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        if not _clone(reader.fileno(), writer.fileno()):
            shutil.copyfileobj(reader, writer, 1 << 20)
    target.chmod(0o644)


def can_clone(directory: Path) -> bool:
    """Whether copies within a directory's file system share their blocks."""
    one, two = directory / "clone-1", directory / "clone-2"
    one.write_bytes(b"x" * 4096)
    with one.open("rb") as reader, two.open("wb") as writer:
        return _clone(reader.fileno(), writer.fileno())


def _clone(source: int, target: int) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        return False
    return True
