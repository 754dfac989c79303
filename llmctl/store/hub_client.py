"""What is asked of huggingface_hub: the files of a revision, and their bytes; every trouble becomes one line.

The token comes from the environment and goes to the hub, nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import InputError, LlmctlError, MachineError, StageError
from llmctl.spec.hub_address import HubAddress
from llmctl.store.hashing import hash_file
from llmctl.store.progress import Meter
from llmctl.store.transfer import parallel

ENDPOINT = "https://huggingface.co"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
TRUE = ("1", "on", "yes", "true")
BELOW = ("1_Pooling/config.json",)
"""Files of subdirectories that a model may need; all others there are of other programs, or other models."""
POLL = 0.5
"""Seconds between two looks at how much of a file is here."""


class Digest(str):
    """`sha256:…` of a file in LFS, `git:…` (git's id of a blob) of any other; empty where it is not known."""

    __slots__ = ()

    @property
    def digits(self) -> str:
        """The hexadecimal digits."""
        return self.partition(":")[2]

    @property
    def is_sha256(self) -> bool:
        """Whether it is the sha256 of the bytes."""
        return self.startswith("sha256:")

    @classmethod
    def of_digits(cls, digits: str) -> Digest:
        """By the length: blobs in the cache are called so."""
        kinds = {64: "sha256", 40: "git"}
        return cls(f"{kinds[len(digits)]}:{digits}" if len(digits) in kinds else "")

    def fits(self, path: Path) -> bool:
        """Whether the file has this digest; an unknown one fits everything."""
        if not self:
            return True
        if self.is_sha256:
            return hash_file(path) == self.digits
        data = path.read_bytes()  # of a file that is small enough to be no LFS object
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == self.digits


@dataclass(frozen=True)
class Listed:
    """One file of a revision."""

    name: str
    size: int
    digest: Digest


class Client:
    """The hub as it is seen through one model repository; with `HF_HUB_OFFLINE`, what of it is in the cache."""

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self.endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self.offline = any(
            os.environ.get(name, "").lower() in TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        )
        self.cache = cache_directory()
        self._token = next((os.environ[name].strip() for name in TOKENS if os.environ.get(name, "").strip()), "")
        self._hub = _library()

    def list_files(self, address: HubAddress) -> tuple[str, dict[str, Listed]]:
        """The commit that `address` means now, and its files by name: those at the top of the repository, and BELOW."""
        if self.offline:
            return self._list_cached(address)
        with self._told(address):
            api = self._hub.HfApi(endpoint=self.endpoint, token=self._token or False)
            info = api.model_info(self.repo, revision=address.revision or None, files_metadata=True, timeout=30)
        found = {}
        for file in info.siblings or ():
            digest = Digest(f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}" if file.blob_id else "")
            at_top = "/" not in file.rfilename and not file.rfilename.startswith(".")
            if at_top or file.rfilename in BELOW:
                found[file.rfilename] = Listed(file.rfilename, int(file.size or 0), digest)
        return str(info.sha), found

    def fetch(self, address: HubAddress, files: Sequence[Listed]) -> dict[str, Path]:
        """These files of a commit, in the cache, by name. Bytes that came now and are not what the hub says are
        removed; a download that broke off is continued by the next one.
        """
        folder = self._snapshot(address.revision)
        if self.offline:
            for file in files:
                self._check(address, file, folder / file.name, keep=True)
            return {file.name: folder / file.name for file in files}
        found: dict[str, Path] = {}

        def fetch(file: Listed) -> None:
            old = (folder / file.name).exists()
            with self._told(address, file):
                path = self._hub.hf_hub_download(
                    self.repo,
                    file.name,
                    revision=address.revision,
                    cache_dir=self.cache,
                    endpoint=self.endpoint,
                    token=self._token or False,
                )
            self._check(address, file, Path(path), keep=old)
            found[file.name] = Path(path)

        with _silence(self._hub), self._watched(address, files):
            parallel(fetch, files)
        return {file.name: found[file.name] for file in files}

    def remember(self, revision: str, commit: str) -> None:
        """Note in the cache what a branch or a tag meant, as the library does, for when there is no network."""
        place = self._folder() / "refs" / (revision or "main")
        with contextlib.suppress(OSError):  # a cache that cannot be written is one of others, who note it
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(commit, encoding="utf-8")

    def _check(self, address: HubAddress, file: Listed, path: Path, *, keep: bool) -> None:
        if file.digest.fits(path):
            return
        blob = path.resolve()
        if not keep:
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
        raise InputError(
            f"{file.name} of {address} is damaged: its {file.digest.partition(':')[0]} digest is not that of the hub",
            hint=f"delete {blob} and run the same again" if keep else "it was thrown away; run the same command again",
        )

    # -- the cache ----------------------------------------------------------------------------------------------------

    def _folder(self) -> Path:
        return self.cache / f"models--{self.repo.replace('/', '--')}"

    def _snapshot(self, commit: str) -> Path:
        return self._folder() / "snapshots" / commit

    def _list_cached(self, address: HubAddress) -> tuple[str, dict[str, Listed]]:
        """The same of what is in the cache; there a file links to its blob, which is called by its digest."""
        commit = address.revision
        if not address.is_commit:
            with contextlib.suppress(OSError):
                commit = (self._folder() / "refs" / (commit or "main")).read_text(encoding="utf-8").strip()
        folder = self._snapshot(commit)
        if not commit or not folder.is_dir():
            raise InputError(
                f"{address} is not in the cache {self.cache}, and HF_HUB_OFFLINE is set",
                hint="fetch it once without HF_HUB_OFFLINE",
            )
        files = {path.name: path for path in sorted(folder.iterdir())} | {name: folder / name for name in BELOW}
        return commit, {
            name: Listed(name, path.stat().st_size, Digest.of_digits(path.resolve().name))
            for name, path in files.items()
            if path.is_file()
        }

    @contextlib.contextmanager
    def _watched(self, address: HubAddress, files: Sequence[Listed]) -> Iterator[None]:
        """Say on stderr how many bytes have come."""
        blobs = [self._folder() / "blobs" / file.digest.digits for file in files if file.digest]
        over = threading.Event()
        before = sum(map(_here, blobs))
        with Meter(f"fetch {self.repo}", max(0, sum(file.size for file in files) - before)) as meter:

            def watch() -> None:
                while not over.wait(POLL):
                    meter(max(0, sum(map(_here, blobs)) - before - meter.done))

            thread = threading.Thread(target=watch, name="fetch", daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()

    # -- errors -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _told(self, address: HubAddress, file: Listed | None = None) -> Iterator[None]:
        """What the library raises inside, as one line of ours."""
        try:
            yield
        except _raised() as error:
            raise self._explain(error, address, file) from error

    def _explain(self, error: BaseException, address: HubAddress, file: Listed | None) -> LlmctlError:
        from huggingface_hub import errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # "not in the cache either"; why it was looked for there is what matters
        key = "export HF_TOKEN=… of an account that may read it"
        if isinstance(error, errors.GatedRepoError):
            return InputError(f"{address} is gated", hint=f"ask for access at {self.endpoint}/{self.repo}, then {key}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return InputError(
                f"there is no model {self.repo} at {self.endpoint}, or it is private",
                hint=f"check the name; for a private one {key}",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return InputError(
                f"{self.repo} has no revision `{address.revision}`",
                hint=f"a branch, a tag or a commit of 40 digits: {self.endpoint}/{self.repo}/commits/main",
            )
        if isinstance(error, errors.HFValidationError):
            return InputError(f"`{self.repo}` is no name of a model", hint="hf://ORG/NAME@REVISION")
        return self._explain_connection(error, address, file)

    def _explain_connection(self, error: BaseException, address: HubAddress, file: Listed | None) -> LlmctlError:
        """Trouble on the way: a refusal, a server that stumbles, no connection, a full disk, a broken download."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return InputError(
                f"{self.endpoint} refuses {address} (HTTP {status})", hint="check HF_TOKEN and what it may read"
            )
        if status is not None:
            return InputError(f"{self.endpoint} answers HTTP {status} for {address}", hint="try again later")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StageError(f"{self.cache} is full", hint="free some space, or set HF_HOME to another disk")
        if isinstance(error, PermissionError):
            return InputError(f"cannot write {self.cache}: {error.strerror}", hint="set HF_HOME to another place")
        if file is not None and "Connect" not in type(error).__name__:
            return InputError(
                f"the download of {file.name} of {address} broke off: {self._plain(error)}",
                hint="run the same command again, it goes on where it was",
            )
        return InputError(
            f"cannot reach {self.endpoint}: {self._plain(error)}",
            hint="check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 takes what is in the cache",
        )

    def _plain(self, error: BaseException) -> str:
        """The innermost reason in a few words, never the token."""
        while (inner := error.__cause__ or error.__context__) is not None:
            error = inner
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        line = text.splitlines()[0][:120]
        return line.replace(self._token, "***") if self._token else line


def cache_directory() -> Path:
    """Where huggingface_hub keeps what it fetched, as its own variables say."""
    environ = os.environ
    named = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(named or Path(home) / "hub").expanduser()


def _library() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise MachineError("hf:// needs the module `huggingface_hub`", hint="pip install 'llmctl[hub]'") from error
    return huggingface_hub


def _raised() -> tuple[type[Exception], ...]:
    """What a request may raise: requests' errors are OSErrors, those of httpx (huggingface_hub 1 and 2) are not."""
    from huggingface_hub import errors

    used: list[Any] = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, errors.HfHubHTTPError, errors.HFValidationError, *(library.HTTPError for library in used))


def _here(blob: Path) -> int:
    """Bytes of a blob that have come so far."""
    for path in (blob, blob.with_name(f"{blob.name}.incomplete")):
        with contextlib.suppress(OSError):
            return path.stat().st_size
    return 0


@contextlib.contextmanager
def _silence(hub: Any) -> Iterator[None]:
    """Without the library's bars and its account of every attempt, whose addresses may be signed."""
    utils, level = hub.utils, hub.logging.get_verbosity()
    shown = not utils.are_progress_bars_disabled()
    hub.logging.set_verbosity(logging.CRITICAL)
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.logging.set_verbosity(level)
        if shown:
            utils.enable_progress_bars()
