"""What this machine has, compared with what stages ask for; and what is worth noting about the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from llmctl.console import human_bytes
from llmctl.errors import MachineError, StageError
from llmctl.launch.failures import free_bytes, no_space
from llmctl.spec.resolved import StageSpec

GPUS = Path("/proc/driver/nvidia/gpus")
LEAST_FREE = 32 << 20
"""Bytes below which no stage is begun: the smallest useful result would not fit."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def devices() -> list[str]:
    """NVIDIA GPUs that stages may be given, as CUDA_VISIBLE_DEVICES names them; what it hides stays hidden."""
    there = [str(number) for number in range(len(list(GPUS.glob("*"))))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    names = [name.strip() for name in visible.split(",")]
    # CUDA takes the names up to the first that means nothing; one that is no number is the UUID of a card.
    known = list(takewhile(lambda name: name and (name in there or not name.lstrip("-").isdigit()), names))
    return known[: len(there)]


def gpu_models() -> list[str]:
    """The names of the NVIDIA GPUs as the driver gives them: `NVIDIA H100 80GB HBM3`."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(GPUS.glob("*/information"))]
    return [line.partition(":")[2].strip() for text in texts for line in text.splitlines() if line.startswith("Model:")]


def memory() -> int:
    """Bytes of memory that this process may have."""
    return memory_limit(_read) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit(read: Callable[[str], str]) -> int | None:
    """Physical memory, or the least limit of this process's control groups if that is less; None if nobody knows.

    `read` gives the text of a file, empty if there is none.
    """
    physical = re.search(r"MemTotal:\s+(\d+) kB", read("/proc/meminfo"))
    limits = [
        int(text) for text in group_values(read, "memory", "memory.max", "memory.limit_in_bytes") if text.isdecimal()
    ]
    return min([*limits, int(physical[1]) * 1024]) if physical else None


def group_values(read: Callable[[str], str], controller: str, v2: str, v1: str) -> Iterator[str]:
    """The values of one setting in the control group of this process and all above it, of either version."""
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if not controllers:
            base, name = Path("/sys/fs/cgroup"), v2
        elif controller in controllers.split(","):
            base, name = Path("/sys/fs/cgroup") / controller, v1
        else:
            continue
        here = base / path.lstrip("/")
        for folder in (here, *(parent for parent in here.parents if parent.is_relative_to(base))):
            if text := read(str(folder / name)).strip():
                yield text


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


WORDS = {"cpus": "{} CPU cores", "gpus": "{} GPUs", "memory": "{} of memory", "disk": "{} of free disk"}
IN_BYTES = ("memory", "disk")


def check_resources(specs: Sequence[StageSpec], store: Path) -> None:
    """MachineError for the first stage that asks for more than there is, of disk where the store is."""
    there = {"cpus": cores(), "gpus": len(devices()), "memory": memory(), "disk": free_bytes(store)}
    for spec in specs:
        for name, most in there.items():
            wanted = getattr(spec.resources, name)
            if wanted is not None and wanted > most:
                shown = (human_bytes(wanted), human_bytes(most)) if name in IN_BYTES else (wanted, most)
                raise MachineError(
                    f"`{spec.id}` asks for {WORDS[name].format(shown[0])}, this machine has {shown[1]}",
                    hint=f"lower its resources: --set stages.{spec.base or spec.id}.resources.{name}=…",
                )
        kind = spec.resources.gpu_type
        if kind is not None and not any(kind.lower() in model.lower() for model in gpu_models()):
            raise MachineError(
                f"`{spec.id}` asks for a GPU of type {kind}, this machine has {', '.join(gpu_models()) or 'none'}",
                hint=f"run it where there is one, or --set stages.{spec.base or spec.id}.resources.gpu_type=…",
            )


def check_space(root: Path) -> None:
    """StageError if the disk of the store is as good as full."""
    if free_bytes(root) < LEAST_FREE:
        failure = no_space(root)
        raise StageError(failure.message, hint=failure.hint)


def git_state(directory: Path) -> str:
    """`3f2a9c1` or `3f2a9c1-dirty` of the repository around `directory`; empty if there is none."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [git, "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
