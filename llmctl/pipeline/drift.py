"""What may decide a result's last digits without being in its key: Python, torch, CUDA, the platform."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

DRIVER = Path("/proc/driver/nvidia/version")
UNCOMPARED = ("git", "devices", "world_size")


def circumstances() -> dict[str, str]:
    """Facts of this machine, found without importing anything heavy: those of a stage's `observed` and the driver's."""
    facts = {
        "python": _now("python"),
        "platform": _now("platform"),
        "torch": _version("torch"),
        "cuda": _version("nvidia-cuda-runtime-cu12") or _version("nvidia-cuda-runtime"),
        "driver": _driver(),
    }
    return {name: value for name, value in facts.items() if value}


def drift(observed: Mapping[str, Any], names: Collection[str] | None = None) -> Iterator[tuple[str, str, str]]:
    """(what, then, now) of each fact that was recorded with a result and is another today; nothing is imported.

    `names` are the facts that count, by default all that can be told; builds of one release count as equal.
    """
    for name, then in observed.items():
        if isinstance(then, str) and then and name not in UNCOMPARED and (names is None or name in names):
            now = _now(name)
            if _release(then) != _release(now):
                yield name, then, now


def _now(name: str) -> str:
    if name == "python":
        return platform.python_version()
    if name == "platform":
        return f"{platform.system().lower()}-{platform.machine()}"
    return _version(name) or _version(f"{name}-gpu") or "not installed"


def _release(version: str) -> str:
    """Without `+cpu`: the metadata of a wheel and the library itself do not always agree on it."""
    return version.partition("+")[0]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    """The version of the NVIDIA driver, empty without one."""
    try:
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\S+)", DRIVER.read_text())
    except OSError:
        return ""
    return found[1] if found else ""
