"""A store somewhere else, behind fsspec: the same layout as a local one, so that any tool can read its plain paths.

Every method tries again a few times when the network or the server stumbles; what stays wrong becomes one line.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from llmctl.errors import InputError, LlmctlError, MachineError, UsageError
from llmctl.spec.files import home_path
from llmctl.store.layout import FORMAT, OWN_NAME, Layout, own_name

T = TypeVar("T")
MARKER = "store.json"
PAUSES = (0.5, 1.0, 2.0)
"""Seconds before each further attempt."""
EXTRAS = {"s3": "llmctl[s3]", "s3a": "llmctl[s3]"}
DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "sftp": "paramiko", "hf": "huggingface_hub"}
FINAL = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
)
CREDENTIALS = (
    "Credential",
    "TokenRetrieval",
    "SSOToken",
    "ProfileNotFound",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
)


class Remote:
    """Files by their path below the remote's root, as in `llmctl.store.layout`."""

    def __init__(self, uri: str) -> None:
        """Raises UsageError for an address that means nothing, MachineError if its driver is not installed."""
        self.uri = uri
        self._fs, root = _filesystem(uri)
        self.root = root.rstrip("/")
        self._local = "file" in _protocols(self._fs)
        self.layout = Layout(Path("/"))

    @property
    def directory(self) -> Path | None:
        """Where it lies on this machine, if it does."""
        return Path(self.root or "/") if self._local else None

    def path(self, local: Path) -> str:
        """The remote path of one that `self.layout` gives."""
        return local.as_posix().lstrip("/")

    def sizes(self, folder: str) -> dict[str, int]:
        """All files below a folder by their path in it, with sizes; empty if there is none. Long listings are whole."""
        full = self._full(folder)

        def find() -> dict[str, int]:
            self._fs.invalidate_cache()
            found = self._fs.find(full, detail=True)
            return {name.removeprefix(full).lstrip("/"): int(info["size"]) for name, info in found.items()}

        try:
            return self._try(f"list {folder}", find)
        except _Absent:
            return {}

    def is_empty(self) -> bool:
        """Whether nothing is there, or only what a process that was killed at its first file or a check has left."""

        def first() -> list[str]:
            self._fs.invalidate_cache()
            return [str(name) for name in self._fs.ls(self.root, detail=False)]

        try:
            found = [name.rstrip("/") for name in self._try("list", first)]
        except _Absent:
            return True
        names = [name.rpartition("/")[2] for name in found if name != self.root.rstrip("/")]
        names = [name for name in names if not OWN_NAME.match(name.removeprefix("."))]
        return not names or (names == ["tmp"] and not self.sizes("tmp"))

    def mark(self) -> bool:
        """Make it a store unless it is one; False if it was. InputError if it is something else."""
        if self.check():
            return False
        if not self.is_empty():
            raise InputError(f"{self.uri} is no llmctl store and not empty", hint="give an empty or a new place")
        self.create(MARKER, (json.dumps({"format": FORMAT}) + "\n").encode())
        return True

    def check(self) -> bool:
        """Whether it says that it is a store. InputError for one of another format."""
        data = self.read(MARKER)
        if data is None:
            return False
        try:
            format = json.loads(data)["format"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.uri}/{MARKER} is damaged", hint='it should hold {"format": 1}') from None
        if format != FORMAT:
            raise InputError(
                f"{self.uri} is a store of format {format}, this llmctl knows {FORMAT}", hint="upgrade llmctl"
            )
        return True

    def read(self, path: str) -> bytes | None:
        """The bytes of a file, None if there is none."""
        try:
            return bytes(self._try(f"read {path}", lambda: self._fs.cat_file(self._full(path))))
        except _Absent:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Write a file, over whatever is there."""
        self._put(path, lambda full: self._fs.pipe_file(full, data))

    def create(self, path: str, data: bytes) -> bool:
        """Write a file if there is none; False if there is. The name appears with its content."""
        full = self._full(path)

        def create() -> bool:
            try:
                if self._local:
                    return self._link(full, data)
                self._parents(full)
                self._fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _precondition(error):
                    return False
                raise
            return True

        return bool(self._write(path, create))

    def upload(self, source: Path, path: str) -> None:
        """Copy a local file to the remote, over whatever is there."""
        self._put(path, lambda full: self._fs.put_file(str(source), full))

    def download(self, path: str, target: Path) -> None:
        """Copy a file of the remote to a local path. InputError if there is none."""
        try:
            self._try(f"read {path}", lambda: self._fs.get_file(self._full(path), str(target)))
        except _Absent:
            raise InputError(f"{self.uri}/{path} is missing", hint="push the artifact again") from None

    def delete(self, path: str) -> None:
        """Remove a file; none is no error."""
        try:
            self._try(f"delete {path}", lambda: self._fs.rm_file(self._full(path)))
        except _Absent:
            return

    # -- how --------------------------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _put(self, path: str, write: Callable[[str], Any]) -> None:
        """On a local disk a name must appear with its content, as it does in an object store."""
        full = self._full(path)

        def put() -> None:
            self._parents(full)
            if not self._local:
                write(full)
                return
            temporary = str(Path(full).with_name(f".{own_name()}"))
            try:
                write(temporary)
                Path(temporary).replace(full)
            finally:
                Path(temporary).unlink(missing_ok=True)

        self._write(path, put)

    def _write(self, path: str, work: Callable[[], T]) -> T:
        """Where nothing can be made, it is as if nothing were there: that is an error where something is written."""
        try:
            return self._try(f"write {path}", work)
        except _Absent as absent:
            raise self._error(f"write {path}", absent.__cause__ or absent) from absent

    def _parents(self, full: str) -> None:
        if "s3" not in _protocols(self._fs):
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)

    def _link(self, full: str, data: bytes) -> bool:
        self._parents(full)
        temporary = Path(full).with_name(f".{own_name()}")
        try:
            temporary.write_bytes(data)
            os.link(temporary, full)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _try(self, what: str, work: Callable[[], T]) -> T:
        """Do it, again after a pause if it may have been bad luck. Raises _Absent for what is not there."""
        for pause in (*PAUSES, None):
            try:
                return work()
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket" or "bucket does not exist" in str(error):
                    raise self._error(what, error) from error
                raise _Absent from error
            except Exception as error:  # drivers raise what they like; what is not bad luck becomes a line
                if isinstance(error, LlmctlError):
                    raise
                if pause is None or isinstance(error, FINAL) or _is_credentials(error) or not _is_transient(error):
                    raise self._error(what, error) from error
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _error(self, what: str, error: BaseException) -> LlmctlError:
        text = " ".join(str(error).split()) or type(error).__name__
        message = f"cannot {what} in {self.uri}: {text}"
        if _is_credentials(error):
            return MachineError(
                message, hint="set the credentials of the driver, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if isinstance(error, FileNotFoundError):
            return InputError(message, hint="make the bucket or the directory first, or check its name")
        if isinstance(error, PermissionError):
            return InputError(message, hint="check the rights of the credentials, and the name of the bucket")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error
        return InputError(message, hint="`llmctl store check` says what the remote can do")


class _Absent(Exception):
    """There is no such file."""


def _filesystem(uri: str) -> tuple[Any, str]:
    import fsspec

    scheme = uri.partition("://")[0] if "://" in uri else "file"
    try:
        target = uri if "://" in uri else str(home_path(uri).absolute())
        options = {"use_listings_cache": False} if scheme in EXTRAS else {}
        filesystem, root = fsspec.core.url_to_fs(target, **options)
    except ImportError as error:
        package = EXTRAS.get(scheme) or DRIVERS.get(scheme) or error.name or scheme
        raise MachineError(
            f"{scheme}:// needs a driver that is not installed", hint=f"pip install '{package}'"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{uri} is no address of a store: {error}", hint="s3://BUCKET/PREFIX, file:///PATH or a path"
        ) from None
    except Exception as error:  # some drivers connect when they are made, and raise what they like
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"cannot open {uri}: {text}", hint="check the address, and whether it can be reached"
        ) from error
    if scheme in EXTRAS and not str(root).strip("/"):
        raise UsageError(f"{uri} names no bucket", hint="s3://BUCKET/PREFIX")
    return filesystem, str(root)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    found = filesystem.protocol
    return (found,) if isinstance(found, str) else tuple(found)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _code(error: BaseException) -> str:
    """The code of an S3 error somewhere behind `error`, such as `SlowDown`."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(dict(response.get("Error") or {}).get("Code", ""))
    return ""


def _precondition(error: BaseException) -> bool:
    return _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412")


def _is_credentials(error: BaseException) -> bool:
    names = [type(cause).__name__ for cause in _causes(error)] + [_code(error)]
    return any(part in name for name in names for part in CREDENTIALS)


def _is_transient(error: BaseException) -> bool:
    """Whether the same may work in a second: broken connections, time-outs, a server that is busy."""
    if isinstance(error, OSError) and not _code(error):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)
    code = _code(error)
    words = ("SlowDown", "Internal", "Unavailable", "Timeout", "Throttl", "RequestTime", "50", "429")
    network = any(word in type(error).__name__ for word in ("Timeout", "Connect", "Client", "Server", "Endpoint"))
    return any(word in code for word in words) or (not code and network)


def remote_uri(text: str, remotes: dict[str, str]) -> str:
    """What a person means by REMOTE: an address or a path as it is, else one of the named `remotes`. UsageError."""
    if "://" in text or text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return text
    if text in remotes:
        return remotes[text]
    from difflib import get_close_matches

    near = get_close_matches(text, remotes, 1)
    known = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(remotes))}" if remotes else ""
    hint = known or "name remotes under store.remotes of a spec (--spec) or of ~/.config/llmctl/config.yaml"
    raise UsageError(f"there is no remote named `{text}`", hint=f"{hint}; a path starts with ./")
