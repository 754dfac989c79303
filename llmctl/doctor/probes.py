"""Experiments, each in a process of its own: `python -m llmctl.doctor.probes NAME [ARGUMENT]` prints one JSON object.

A broken library may crash, hang or print; that is then the finding. Libraries are imported by name, for this module
must be importable without any of them.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

IDENTITY = "CAg6PgoQCgF4EgF5IghJZGVudGl0eRIIaWRlbnRpdHlaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN"
"""An ONNX model, y = x for one float vector; written out, since `onnx` is no dependency of the base."""

WHOLE = "x" * 65536
"""What a file holds whose place others take; a copy of it takes a moment."""
REPLACEMENTS = 50


def torch() -> dict[str, Any]:
    """Version, build, and whether a product of matrices is right on the CPU and on the first GPU."""
    torch = import_module("torch")
    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "available": False}
    ones = torch.ones(8, 8)
    found["cpu"] = float((ones @ ones).sum()) == 512.0
    if torch.version.cuda:
        try:
            torch.cuda.init()
            found["available"] = bool(torch.cuda.is_available())
            ones = ones.cuda()
            found["gpu"] = float((ones @ ones).sum()) == 512.0
            found["device"] = torch.cuda.get_device_name(0)
        except Exception as error:
            found["error"] = " ".join(str(error).split())[:300]
    return found


def onnxruntime() -> dict[str, Any]:
    """For each provider that is listed, whether a session on it really is one: None, or why not."""
    runtime = import_module("onnxruntime")
    runtime.set_default_logger_severity(4)
    model = base64.b64decode(IDENTITY)
    providers: dict[str, str | None] = {}
    for name in runtime.get_available_providers():
        try:
            session = runtime.InferenceSession(model, providers=[name])
            taken = session.get_providers()
            providers[name] = None if name in taken else f"a session falls back to {', '.join(taken)}"
        except Exception as error:
            providers[name] = " ".join(str(error).split())[:300]
    return {"version": runtime.__version__, "providers": providers}


def place(directory: str) -> dict[str, Any]:
    """What the file system of a directory can do; everything that is made there is removed again."""
    with tempfile.TemporaryDirectory(prefix=".llmctl-doctor-", dir=directory) as name:
        folder = Path(name)
        begun = time.time()
        (folder / "a").write_text("new")
        skew = (folder / "a").stat().st_mtime - begun
        return {
            "skew": skew,
            "case": not (folder / "A").exists(),
            "rename": _renames(folder),
            "link": _links(folder),
            "flock": _locks(folder),
            "fsync": _syncs(folder),
        }


def _renames(folder: Path) -> bool:
    """Whether a directory gets a new name, and a file the place of another with no moment in which neither is there."""
    target, fresh = folder / "old", folder / "fresh"
    target.write_text(WHOLE)
    try:
        (folder / "tree").mkdir()
        (folder / "tree" / "leaf").write_text(WHOLE)
        (folder / "tree").rename(folder / "moved")
        done = Event()
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(_stays_whole, target, done)
            try:
                for _ in range(REPLACEMENTS):
                    fresh.write_text(WHOLE)
                    fresh.replace(target)
            finally:
                done.set()
    except OSError:
        return False
    return whole.result() and (folder / "moved" / "leaf").read_text() == WHOLE and not (folder / "tree").exists()


def _stays_whole(path: Path, done: Event) -> bool:
    """Whether a file can be read, and is whole, whenever it is looked at."""
    while not done.is_set():
        try:
            if path.read_text() != WHOLE:
                return False
        except FileNotFoundError:
            return False
        except OSError:  # the old one, half read when a network file system lets go of it
            continue
    return True


def _links(folder: Path) -> bool:
    try:
        os.link(folder / "a", folder / "link")
    except OSError:
        return False
    return (folder / "link").stat().st_nlink == 2


def _locks(folder: Path) -> bool:
    """Whether a second descriptor is really kept out."""
    import fcntl

    with (folder / "lock").open("w") as first, (folder / "lock").open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _syncs(folder: Path) -> bool:
    for path, flags in ((folder / "a", os.O_RDWR), (folder, os.O_RDONLY)):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        except OSError:
            return False
        finally:
            os.close(descriptor)
    return True


def temporary() -> dict[str, Any]:
    """Where temporary files go, and whether a program may be started from there."""
    import subprocess

    with tempfile.TemporaryDirectory(prefix="llmctl-doctor-") as name:
        script = Path(name) / "script"
        script.write_text("#!/bin/sh\nexit 0\n")
        script.chmod(0o755)
        try:
            runs = subprocess.run([str(script)], check=False, timeout=10).returncode == 0
        except OSError:
            runs = False
    return {"directory": tempfile.gettempdir(), "exec": runs}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": torch,
    "onnxruntime": onnxruntime,
    "place": place,
    "temporary": temporary,
}

if __name__ == "__main__":
    # Libraries print where they like; the answer goes to the descriptor that was stdout, and stdout to stderr.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(PROBES[sys.argv[1]](*sys.argv[2:]), answer)
    answer.flush()
    os._exit(0)  # the clean-up of a broken library at exit is not what was asked about
