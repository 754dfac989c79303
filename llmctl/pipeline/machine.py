"""What this machine has, compared with what stages ask for; and what is worth noting about the code."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from llmctl.errors import MachineError, StageError
from llmctl.launch.failures import free_bytes, no_space
from llmctl.spec.resolved import StageSpec

LEAST_FREE = 32 << 20
"""Bytes below which no stage is begun: the smallest useful result would not fit."""


def check_resources(specs: Sequence[StageSpec]) -> None:
    """MachineError for the first stage that asks for more than there is."""
    for spec in specs:
        for name, wanted, there in (
            ("CPU cores", spec.resources.cpus, len(os.sched_getaffinity(0))),
            ("GPUs", spec.resources.gpus, len(list(Path("/proc/driver/nvidia/gpus").glob("*")))),
        ):
            if wanted is not None and wanted > there:
                raise MachineError(
                    f"`{spec.id}` asks for {wanted} {name}, this machine has {there}",
                    hint=f"lower its resources: --set stages.{spec.id}.resources.{'gpus' if 'G' in name else 'cpus'}=…",
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
