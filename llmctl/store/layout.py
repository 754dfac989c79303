"""Where everything lies in a store (`pipeline.md` 2.3), and how its directory is found, checked and created."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import InputError

FORMAT = 1
ENVIRONMENT = "LLMCTL_STORE"
HOME = ".llmctl"
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
OWN_NAME = re.compile(r"(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}(-old)?\Z")


@dataclass(frozen=True)
class Layout:
    """Paths below `root`. Ids and keys are `sha256:` and 64 hexadecimal digits."""

    root: Path

    def artifact(self, id: str) -> Path:
        """`artifacts/sha256/f6/f6d3…`: the directory of a committed artifact."""
        return self.root / "artifacts" / "sha256" / digest_of(id)[:2] / digest_of(id)

    def key(self, key: str) -> Path:
        """`keys/8e/8e0c….json`: the pointer of an action key."""
        return self.root / "keys" / digest_of(key)[:2] / f"{digest_of(key)}.json"

    def request(self, key: str) -> Path:
        """`requests/8e/8e0c….json`: what `stage exec` must do."""
        return self.root / "requests" / digest_of(key)[:2] / f"{digest_of(key)}.json"

    def record(self, id: str, key: str) -> Path:
        """`records/<id>/<key>.json`: a later producer of the same bytes."""
        return self.root / "records" / digest_of(id) / f"{digest_of(key)}.json"

    def work(self, resume_key: str, number: int = 1) -> Path:
        """`work/<resume key>`: unfinished state that survives crashes; `.2` for a second runner at the same time."""
        return self.root / "work" / (digest_of(resume_key) + _numbered(number))

    def lock(self, resume_key: str, number: int = 1) -> Path:
        """`locks/<resume key>.lock`: guards the work directory of the same number."""
        return self.root / "locks" / f"{digest_of(resume_key)}{_numbered(number)}.lock"

    def signatures(self, id: str) -> Path:
        """`signatures/<id>`: one `<fingerprint>.sig` per key that signed the artifact."""
        return self.root / "signatures" / digest_of(id)

    def external(self, id: str) -> Path:
        """`externals/<id>.json`: which files an input from outside the store was, and where."""
        return self.root / "externals" / f"{digest_of(id)}.json"

    def trash(self, kind: str, name: str) -> Path:
        """A new path under `trash/` that says when it was thrown away, what kind of thing it was, and its name."""
        path = (
            self.root
            / "trash"
            / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}--{kind}--{uuid.uuid4().hex[:8]}--{name}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, id: str) -> Path:
        """`runs/<run id>`."""
        return self.root / "runs" / id

    @property
    def refs(self) -> Path:
        """`refs/<pipeline>/<stage>.<port>.json`: names of latest results."""
        return self.root / "refs"

    @property
    def roots(self) -> Path:
        """`roots/<project>/`: the names of every project that uses this store from outside."""
        return self.root / "roots"

    @property
    def guard(self) -> Path:
        """`guard.lock`: held for an instant by who finds artifacts and who takes them away (`llmctl.store.guard`)."""
        return self.root / "guard.lock"

    @property
    def digests(self) -> Path:
        """The cache of digests of files outside the store."""
        return self.root / "digests.sqlite"

    @property
    def durations(self) -> Path:
        """How long stages took."""
        return self.root / "durations.json"

    def temporary(self) -> Path:
        """A new path under `tmp/`, on the file system of the artifacts; named after its process for `sweep`."""
        path = self.root / "tmp" / own_name()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def staging(self) -> Path:
        """A new directory at such a path."""
        path = self.temporary()
        path.mkdir()
        return path

    def sweep(self) -> None:
        """Remove what killed processes of this host left under `tmp/`."""
        sweep_dead(self.root / "tmp")

    def create(self) -> None:
        """Make the store's directory. InputError if it cannot be written or holds something else."""
        marker = self.root / "store.json"
        if marker.exists():
            if not os.access(self.root, os.W_OK):
                raise self._unwritable("it is read-only")
            return
        check_free(self.root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if self.root.parent.name == HOME and not (self.root.parent / ".gitignore").exists():
                (self.root.parent / ".gitignore").write_text("*\n")
            temporary = self.root / f".store-{uuid.uuid4().hex}"
            temporary.write_text(json.dumps({"format": FORMAT}) + "\n")
            temporary.replace(marker)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise self._unwritable(str(error.strerror)) from error

    def _unwritable(self, why: str) -> InputError:
        return InputError(
            f"cannot write the store {self.root}: {why}", hint=f"choose another: --store or {ENVIRONMENT}"
        )


def relist(directory: Path) -> None:
    """Before something counts as missing: on NFS a listing drops what the client remembers of absent names."""
    with contextlib.suppress(OSError):
        os.listdir(directory)  # noqa: PTH208  # nothing is made of the names


def own_name() -> str:
    """A new name that says which process of which host it belongs to."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"


def sweep_dead(directory: Path, prefix: str = "") -> None:
    """Remove the entries `prefix` + `own_name()` of processes of this host that are no more."""
    for path in left_by_dead(directory, prefix):
        remove(path)


def left_by_dead(directory: Path, prefix: str = "") -> Iterator[Path]:
    """What `sweep_dead` removes."""
    for path in directory.glob(f"{glob.escape(prefix)}*"):
        match = OWN_NAME.match(path.name.removeprefix(prefix))
        if match and match["host"] == socket.gethostname() and not _alive(int(match["pid"])):
            yield path


def remove(path: Path) -> None:
    """Delete a file or a directory with all that is in it; what is gone already, or cannot be deleted, is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def locate(path: Path | None) -> Path:
    """`path`, else `$LLMCTL_STORE`, else the store of the nearest parent that has `.llmctl/`, else the one that the
    user's configuration names, else one here."""
    if path is not None:
        return path.absolute()
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).expanduser().absolute()
    here = Path.cwd()
    home = next((parent for parent in (here, *here.parents) if (parent / HOME).is_dir()), None)
    if home is None:
        from llmctl.spec.user_config import user_config

        if own := user_config().store:
            return Path(own)
    return (home or here) / HOME / "store"


def check_free(root: Path) -> None:
    """Refuse a directory that is no store and not empty, and a store of a newer llmctl."""
    marker = root / "store.json"
    if marker.is_file():
        try:
            format = json.loads(marker.read_text())["format"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{marker} is damaged", hint='it should hold {"format": 1}') from None
        if format != FORMAT:
            raise InputError(f"{root} is a store of format {format}, this llmctl knows {FORMAT}", hint="upgrade llmctl")
    elif root.is_file():
        raise InputError(f"the store {root} is a file", hint="give a directory")
    elif root.is_dir() and any(not entry.name.startswith(".store-") for entry in root.iterdir()):
        raise InputError(f"{root} is no llmctl store", hint="give an empty or a new directory")


def digest_of(id: str) -> str:
    """The hexadecimal digits of an id or a key."""
    return id.removeprefix("sha256:")


def _numbered(number: int) -> str:
    return f".{number}" if number > 1 else ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # A zombie that nobody reaps (a container without an init) holds nothing any more.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True
