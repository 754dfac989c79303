"""Checkpoints that are written while training goes on: by a thread of one process, or by all ranks through torch's DCP.

The tensors are copied to the host before training goes on; everything after that is the thread's. Several ranks write
what each of them holds, as safetensors with the places of the parts, so that nothing is gathered and nothing is
unpickled; rank 0 makes the checkpoint whole when all have written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmctl.errors import StageError
from llmctl.train.checkpoint import Checkpoints
from llmctl.train.parts import local
from llmctl.train.ranks import Ranks


class Saver:
    """Writes one checkpoint at a time; all ranks of a run start and finish the same ones."""

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks, saved: Callable[[int], None]) -> None:
        self.checkpoints, self.ranks = checkpoints, ranks
        self._saved = saved
        """Told of every step whose checkpoint is complete, in the thread that trains."""
        self._running: Future[Any] | None = None
        self._step = 0
        # Its messages must not get between those of the training.
        self._group = dist.new_group(backend="gloo") if ranks.mesh is not None else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if ranks.mesh is None else None

    def start(
        self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], pinned: Collection[int] = ()
    ) -> None:
        """Copy the tensors and write them later, once the one before is written; StageError if that failed."""
        self.wait()
        self._step = step
        if self._thread is not None:
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            self._running = self._thread.submit(self.checkpoints.save, step, copies, values, pinned)
            return
        if self.ranks.main:
            with self.checkpoints.writing(step):
                self.checkpoints.begin(step, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        self.ranks.wait()
        done = partial(self.checkpoints.commit, step, values, pinned)
        self._running = start_parts(tensors, self.checkpoints.directory / f".tmp-step-{step}", done, self._group)

    def look(self) -> None:
        """Tell of a checkpoint that has become complete; StageError if it could not be written."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint is complete; StageError if it could not be written."""
        running, self._running = self._running, None
        if running is None:
            return
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            running.result()
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            where = self.checkpoints.path(self._step)
            raise StageError(f"cannot write the checkpoint {where}: rank {rank}: {cause}") from error
        self._saved(self._step)

    def close(self) -> None:
        """Give the thread back; what it writes is written to its end. Ranks after an error end with their process."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        # A group that somebody still knows when the interpreter ends is taken down too late: the process would abort.
        self._running = self._group = None


def start_parts(
    tensors: Mapping[str, Tensor], aside: Path, done: Callable[[], object], group: dist.ProcessGroup | None
) -> Future[Any]:
    """Copy this rank's parts and write them into `aside` in a thread; once all have, rank 0 calls `done` in its own."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    class Writer(HuggingFaceStorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            done()

    writer = Writer(str(aside), save_distributed=True)
    started = async_save({n: t.detach() for n, t in tensors.items()}, storage_writer=writer, process_group=group)
    assert isinstance(started, Future)
    return started


def load_parts(path: Path, like: Callable[[str], Tensor | None], alone: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint in `path` that several ranks, or one, have written.

    `like(name)` says how this rank holds a tensor, None if whole; it comes back parted in the same way if it has that
    shape. All ranks must ask, unless `alone`. ValueError if it cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(path))
    try:
        found = {
            name: empty(torch.Size(entry.size), entry.properties.dtype, like(name))
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)  # there is nothing else
        }
        load(found, storage_reader=reader, no_dist=alone)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {str(error).strip().splitlines()[-1]}") from error
    return found


def empty(shape: torch.Size, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """A tensor to be filled, on the host unless it is parted as `like` is."""
    if isinstance(like, DTensor) and like.shape == shape:
        return torch.zeros_like(like, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)


def same_parts(held: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> bool:
    """Whether what this rank holds is bit for bit in what it has read, where other ranks' tensors are, too."""
    return all(name in read and torch.equal(_bits(tensor), _bits(read[name])) for name, tensor in held.items())


def _bits(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8)
