"""Why a stage failed, in one line for a person: expected errors, a full disk, no memory, a bug, a signal."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import LlmctlError, StageError

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TEXT = ("no space left on device", "disk quota exceeded", "database or disk is full")
MEMORY_TEXT = ("out of memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator", "bad_alloc")
MEMORY_HINT = "use a smaller batch, model or context, or a machine with more memory"
ALMOST_FULL = 1 << 20
"""A library's obscure error is taken for a full disk if fewer bytes than this are left."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """`bug` marks what nobody expected; its traceback is in the log."""

    code: int
    message: str
    hint: str = ""
    bug: bool = False


def explain(error: BaseException, owner: str, store: Path) -> Failure:
    """The failure behind an exception of a stage; `owner` is the distribution that a bug is reported to."""
    if isinstance(error, LlmctlError):
        return Failure(code=error.exit_code, message=error.message, hint=error.hint or "")
    if _full(error, store):
        return no_space(store)
    if _no_memory(error):
        return Failure(code=StageError.exit_code, message=f"out of memory: {_line(error)}", hint=MEMORY_HINT)
    if isinstance(error, SystemExit):
        return Failure(code=1, message=f"it called sys.exit({error.code!r})", hint=_bug(owner), bug=True)
    return Failure(code=1, message=f"{type(error).__name__}: {_line(error)}", hint=_bug(owner), bug=True)


def no_space(store: Path) -> Failure:
    """The failure that a full disk is."""
    hint = "free some space, or put the store on another disk with --store"
    return Failure(code=StageError.exit_code, message=f"no space left on device, in {store}", hint=hint)


def killed(returncode: int, owner: str) -> Failure:
    """The failure of a process that ended without a word; a negative `returncode` is a signal, as in subprocess."""
    if returncode == -signal.SIGKILL:
        text = "it was killed (SIGKILL), most likely by the kernel because memory ran out"
        return Failure(code=StageError.exit_code, message=text, hint=MEMORY_HINT)
    if returncode < 0:
        text = f"it crashed with {signal.Signals(-returncode).name}"
        return Failure(code=StageError.exit_code, message=text, hint="the log names the place")
    text = f"it ended with exit {returncode} without a result"
    return Failure(code=1, message=text, hint=_bug(owner), bug=True)


def _bug(owner: str) -> str:
    return f"this is a bug in {owner}; the traceback is in the log"


def _line(error: BaseException) -> str:
    """The message on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _full(error: BaseException, store: Path) -> bool:
    """Whether a full disk is behind it. Libraries in Rust and C++ wrap ENOSPC in errors of their own."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in FULL:
            return True
        if any(text in str(link).lower() for text in FULL_TEXT):
            return True
    return isinstance(error, OSError | RuntimeError) and free_bytes(store) < ALMOST_FULL


def _no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in MEMORY_TEXT)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` is or would be."""
    import shutil

    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free
