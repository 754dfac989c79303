"""Checkpoints through torch's distributed checkpoints: copied at once, written by a thread, whole or not there.

Each rank writes the parts that it has, and reads those that it wants, so they load on any number of ranks. The last
good ones are always kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from llmctl.errors import StageError
from llmctl.train.parts import local
from llmctl.train.storage import ASIDE, INDEX, VALUES, Reader, Writer, load, save

STEP = re.compile(r"step-(\d+)\Z")
MARGIN = 1 << 20
SINGLE = "tensors.safetensors"
"""All tensors of a checkpoint that an earlier version of llmctl has written."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to go on after `step` updates: named tensors, and JSON values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Copies(DefaultSavePlanner):
    """Plans from the tensors as the model has them, takes the bytes from copies of this rank's parts."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy: by the time it is written training has gone on."""
        return self.copies[index.fqn]


class Checkpoints:
    """The directories `step-N` under `directory`; the last `keep` stay. `written` hears of each that is complete.

    With several ranks every method but those that say so must be called by all.
    """

    def __init__(self, directory: Path, keep: int = 2, written: Callable[[int], None] = lambda step: None) -> None:
        self.directory, self.keep, self.written = directory, keep, written
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # Of its own: the thread talks while the loop does.
        self._group = dist.new_group(backend="gloo") if several else None
        self._rank = dist.get_rank() if several else 0
        self._writing: tuple[int, Future[None]] | None = None
        self._copies: dict[str, Tensor] = {}
        self._thread: ThreadPoolExecutor | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], pinned: Collection[int] = ()
    ) -> Path:
        """Copy everything, and let a thread write it while training goes on; one that is still written is waited for.

        It is complete or not there. Those of the steps `pinned` stay beside the last `keep`. StageError if the disk is
        full, also of the one before; what goes wrong in the thread is raised by `poll` or `wait`.
        """
        self.wait()
        final, aside = self.directory / f"step-{step}", self.directory / f"{ASIDE}{step}"
        if self._rank == 0:
            there = next(path for path in (self.directory, *self.directory.parents) if path.is_dir())
            require_space(
                there, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), "a checkpoint"
            )
        text = json.dumps({**values, "step": step})
        copied = self._copy(tensors)
        parts = {
            name: tensor if isinstance(tensor, DTensor) else self._copies[name] for name, tensor in tensors.items()
        }
        writer = Writer(aside, final, text, self._rank, lambda: self._remove_old(step, pinned))

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            save(parts, Copies(self._copies), writer, self._group)

        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = step, self._thread.submit(write)
        return final

    def _copy(self, tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        """This rank's parts in memory of the host that is used again; from a GPU complete when the event is over."""
        kept, self._copies = self._copies, {}
        event = None
        for name, tensor in tensors.items():
            part = local(tensor.detach())
            copy = kept.get(name)
            if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
                copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.device.type == "cuda")
            self._copies[name] = copy.copy_(part, non_blocking=True)
            if part.device.type == "cuda" and event is None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
        if event is not None:
            event.record()
        return event

    def _remove_old(self, step: int, pinned: Collection[int]) -> None:
        # Those of a run that went further are not this run's, and stay.
        for old in [found for found in self.steps() if found <= step and found not in pinned][: -self.keep]:
            shutil.rmtree(self.directory / f"step-{old}")

    def poll(self) -> None:
        """Look whether the one that is being written is complete; StageError if it cannot be. Any rank, any time."""
        if self._writing is not None and self._writing[1].done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written any more; StageError if it cannot be."""
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except (CheckpointException, OSError, SafetensorError) as error:
            raise StageError(
                f"cannot write the checkpoint {self.directory / f'step-{step}'}: {_cause(error)}",
                hint="free some disk space, then run the same command",
            ) from error
        self.written(step)

    def close(self) -> None:
        """End the thread; what it is writing is waited for, and not asked how it went."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._copies = {}
        # A group that is still known when the interpreter ends is taken down too late: the process would abort.
        self._writing = self._group = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, rising. Any rank."""
        if not self.directory.is_dir():
            return []
        return sorted(int(match[1]) for path in self.directory.iterdir() if (match := STEP.match(path.name)))

    def load(
        self,
        step: int,
        like: Callable[[str], Tensor | None] = lambda name: None,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> Checkpoint:
        """Read the `wanted` tensors of a checkpoint; ValueError if it is damaged, on all ranks if it is for one.

        Tensors are whole and on the CPU; where `like` knows one, they are parted and placed as that is.
        """
        self.wait()
        path = self.directory / f"step-{step}"
        try:
            values = json.loads((path / VALUES).read_text(encoding="utf-8"))
            if (path / SINGLE).is_file() and not (path / INDEX).exists():
                with safe_open(path / SINGLE, framework="pt") as file:
                    names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118  # not a dict
                    return Checkpoint(step, {name: file.get_tensor(name) for name in names}, values)
            tensors = self._read(path, like, wanted)
        except (CheckpointException, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {_cause(error)}") from error
        return Checkpoint(step, tensors, values)

    def _read(
        self, path: Path, like: Callable[[str], Tensor | None], wanted: Callable[[str], bool]
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, row in Reader(path).tensors().items():
            if not wanted(name):
                continue
            target = like(name)
            if target is not None and target.shape == row.size:
                tensors[name] = torch.empty_like(target, dtype=row.properties.dtype, requires_grad=False)
            else:
                tensors[name] = torch.empty(row.size, dtype=row.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        load(tensors, planner, Reader(path), self._group)
        return tensors

    def newest(self, limit: int) -> list[int]:
        """Steps up to `limit`, falling: where to try to continue. Any rank."""
        return [step for step in reversed(self.steps()) if step <= limit]

    def forget_after(self, step: int, limit: int) -> None:
        """Remove what is not continued, damaged or of other parameters, between `step` and `limit`. Rank 0 alone.

        Of what lies beyond, which a run that went further has left, the last stays for the next one that goes so far.
        """
        beyond = [found for found in self.steps() if found > limit]
        for found in self.steps():
            if step < found <= limit or found in beyond[:-1]:
                shutil.rmtree(self.directory / f"step-{found}")

    def finish(self, step: int) -> None:
        """The run has ended at `step`: keep that one, for a run that goes on, and the last beyond. Rank 0 alone."""
        for found in self.steps():
            if found < step:
                shutil.rmtree(self.directory / f"step-{found}")


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank where something did."""
    return (
        next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) and error.failures else error
    )


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names with bit-identical tensors, of which each rank compares its parts."""
    return set(a) == set(b) and all(torch.equal(_bits(a[name]), _bits(b[name])) for name in a)


def _bits(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).cpu().reshape(-1).view(torch.uint8)


def require_space(directory: Path, size: int, what: str) -> None:
    """StageError unless the disk under `directory` has `size` bytes and a margin left."""
    free = shutil.disk_usage(directory).free
    if free < size + MARGIN:
        raise StageError(
            f"{what} needs {(size + MARGIN) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free in {directory}",
            hint="free some disk space, then run the same command",
        )
