"""Checkpoints: written aside, flushed, renamed; read back without pickle; the last good one is always kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmctl.errors import StageError

STEP = re.compile(r"step-(\d+)\Z")
MARGIN = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to go on after `step` updates: named tensors, and JSON values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoints:
    """The directories `step-N` under `directory`, each with its tensors and JSON values; the last `keep` stay."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory, self.keep = directory, keep

    def save(
        self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], pinned: Collection[int] = ()
    ) -> Path:
        """Write a checkpoint that is either complete or not there; StageError if the disk is full.

        Those of the steps `pinned` stay beside the last `keep`.
        """
        final, aside = self.directory / f"step-{step}", self.directory / f".tmp-step-{step}"
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob(".tmp-step-*"):  # of a run that was killed
                shutil.rmtree(left)
            require_space(self.directory, sum(tensor.nbytes for tensor in plain.values()), "a checkpoint")
            aside.mkdir()
            save_file(plain, aside / "tensors.safetensors")
            (aside / "values.json").write_text(json.dumps({**values, "step": step}), encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                _flush(path)
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            _flush(self.directory)
            # Those of a run that went further are not this run's, and stay.
            for old in [found for found in self.steps() if found <= step and found not in pinned][: -self.keep]:
                shutil.rmtree(self.directory / f"step-{old}")
        except (OSError, SafetensorError) as error:
            raise StageError(
                f"cannot write the checkpoint {final}: {error}", hint="free some disk space, then run the same command"
            ) from error
        return final

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, rising."""
        if not self.directory.is_dir():
            return []
        return sorted(int(match[1]) for path in self.directory.iterdir() if (match := STEP.match(path.name)))

    def load(self, step: int) -> Checkpoint:
        """Read one checkpoint; ValueError if it is damaged."""
        path = self.directory / f"step-{step}"
        try:
            values = json.loads((path / "values.json").read_text(encoding="utf-8"))
            with safe_open(path / "tensors.safetensors", framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return Checkpoint(step, tensors, values)

    def newest(self, limit: int) -> list[int]:
        """Steps up to `limit`, falling: where to try to continue."""
        return [step for step in reversed(self.steps()) if step <= limit]

    def forget_after(self, step: int, limit: int) -> None:
        """Remove what is not continued, damaged or of other parameters, between `step` and `limit`.

        Of what lies beyond, which a run that went further has left, the last stays for the next one that goes so far.
        """
        beyond = [found for found in self.steps() if found > limit]
        for found in self.steps():
            if step < found <= limit or found in beyond[:-1]:
                shutil.rmtree(self.directory / f"step-{found}")

    def finish(self, step: int) -> None:
        """The run has ended at `step`: keep that checkpoint, for a run that goes further, and the last beyond it."""
        for found in self.steps():
            if found < step:
                shutil.rmtree(self.directory / f"step-{found}")


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names with bit-identical tensors."""
    return set(a) == set(b) and all(torch.equal(_bits(a[name]), _bits(b[name])) for name in a)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


def require_space(directory: Path, size: int, what: str) -> None:
    """StageError unless the disk under `directory` has `size` bytes and a margin left."""
    free = shutil.disk_usage(directory).free
    if free < size + MARGIN:
        raise StageError(
            f"{what} needs {(size + MARGIN) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free in {directory}",
            hint="free some disk space, then run the same command",
        )


def _flush(path: Path) -> None:
    """Make sure that what was written survives a power cut; directories hold the names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
