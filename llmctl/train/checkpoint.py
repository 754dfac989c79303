"""Checkpoints: written aside, flushed, renamed; read back without pickle; the last good one is always kept.

One process writes one file of tensors. Several write one each, what they hold, into the same directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
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


VALUES = "values.json"
WHOLE = "tensors.safetensors"


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
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with self.writing(step):
            aside = self.begin(step, sum(tensor.nbytes for tensor in plain.values()))
            save_file(plain, aside / WHOLE)
        return self.commit(step, values, pinned)

    def begin(self, step: int, size: int) -> Path:
        """The empty directory in which a checkpoint of `size` bytes is to be written; StageError if they do not fit."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".tmp-step-*"):  # of a run that was killed
            shutil.rmtree(left)
        require_space(self.directory, size, "a checkpoint")
        aside = self.directory / f".tmp-step-{step}"
        aside.mkdir()
        return aside

    def commit(self, step: int, values: Mapping[str, Any], pinned: Collection[int] = ()) -> Path:
        """Make what was written since `begin` the checkpoint of `step`: flushed, then renamed; old ones are removed."""
        final, aside = self.directory / f"step-{step}", self.directory / f".tmp-step-{step}"
        with self.writing(step):
            # A file of several that went missing later must not pass for tensors that were never there.
            sizes = {path.name: path.stat().st_size for path in aside.iterdir()}
            text = json.dumps({**values, "step": step, "files": sizes})
            (aside / VALUES).write_text(text, encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                _flush(path)
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            _flush(self.directory)
            # Those of a run that went further are not this run's, and stay.
            for old in [found for found in self.steps() if found <= step and found not in pinned][: -self.keep]:
                shutil.rmtree(self.directory / f"step-{old}")
        return final

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """What goes wrong inside is a StageError that names the checkpoint."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise StageError(
                f"cannot write the checkpoint {self.directory / f'step-{step}'}: {error}",
                hint="free some disk space, then run the same command",
            ) from error

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, rising."""
        if not self.directory.is_dir():
            return []
        return sorted(int(match[1]) for path in self.directory.iterdir() if (match := STEP.match(path.name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / f"step-{step}"

    def is_whole(self, step: int) -> bool:
        """Whether one file holds all tensors: one process has written it."""
        return (self.path(step) / WHOLE).exists()

    def values(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; ValueError if a file of it is missing or cut off."""
        path = self.path(step)
        try:
            found: dict[str, Any] = json.loads((path / VALUES).read_text(encoding="utf-8"))
            for name, size in found.pop("files", {}).items():
                if (there := (path / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {there} bytes of {size}")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return found

    def load(self, step: int) -> Checkpoint:
        """Read one checkpoint that is one file; ValueError if it is damaged."""
        values = self.values(step)
        path = self.path(step)
        try:
            with safe_open(path / WHOLE, framework="pt") as file:
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
