"""What may decide a result's last digits without being in its key: Python, torch, CUDA, the platform."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

DRIVER = Path("/proc/driver/nvidia/version")
SHOWN = ("python", "torch")
"""Facts whose change is worth a note in `plan`."""


def circumstances() -> dict[str, str]:
    """Facts of this machine, found without importing anything heavy: those of a stage's `observed` and the driver's."""
    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        "torch": _version("torch"),
        "cuda": _version("nvidia-cuda-runtime-cu12") or _version("nvidia-cuda-runtime"),
        "driver": _driver(),
    }
    return {name: value for name, value in facts.items() if value}


def drift(observed: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """`made with torch 2.12.0, now 2.13.0` for what has changed since a result was made; builds count as equal."""
    return [
        f"made with {name} {observed[name]}, now {now[name]}"
        for name in SHOWN
        if name in now and observed.get(name) and _release(str(observed[name])) != _release(now[name])
    ]


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
