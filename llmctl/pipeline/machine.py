"""What this machine has, compared with what stages ask for; and what is worth noting about the code."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from llmctl.console import human_bytes
from llmctl.errors import MachineError, StageError
from llmctl.launch.failures import free_bytes, no_space
from llmctl.spec.resolved import StageSpec

LEAST_FREE = 32 << 20
"""Bytes below which no stage is begun: the smallest useful result would not fit."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def devices() -> list[str]:
    """NVIDIA GPUs that stages may be given, as CUDA_VISIBLE_DEVICES names them; what it hides stays hidden."""
    there = [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    names = [name.strip() for name in visible.split(",")]
    # CUDA takes the names up to the first that means nothing; one that is no number is the UUID of a card.
    known = list(takewhile(lambda name: name and (name in there or not name.lstrip("-").isdigit()), names))
    return known[: len(there)]


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_resources(specs: Sequence[StageSpec]) -> None:
    """MachineError for the first stage that asks for more than there is."""
    there = {"cpus": cores(), "gpus": len(devices()), "memory": memory()}
    words = {"cpus": "{} CPU cores", "gpus": "{} GPUs", "memory": "{} of memory"}
    for spec in specs:
        for name, most in there.items():
            wanted = getattr(spec.resources, name)
            if wanted is not None and wanted > most:
                shown = (human_bytes(wanted), human_bytes(most)) if name == "memory" else (wanted, most)
                raise MachineError(
                    f"`{spec.id}` asks for {words[name].format(shown[0])}, this machine has {shown[1]}",
                    hint=f"lower its resources: --set stages.{spec.base or spec.id}.resources.{name}=…",
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
