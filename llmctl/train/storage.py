"""Where torch's distributed checkpoints put their bytes: safetensors files with a JSON index, nothing pickled.

A checkpoint is a directory: `rank-R.safetensors` with the parts that rank R had, `index.json` that says which part of
which tensor lies where, and `values.json`. It is written under another name, flushed, and renamed by the coordinator
when all ranks are done, so it is whole or not there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

INDEX, VALUES = "index.json", "values.json"
ASIDE = ".tmp-step-"
"""How the name of a checkpoint begins that is not finished."""


@dataclass(frozen=True)
class Place:
    """The file and the name in it of one part of a tensor."""

    file: str
    key: str


class Writer(StorageWriter):
    """Writes the parts of this rank to `aside`; the coordinator adds index and `values`, and renames it to `final`.

    `finished` is called there afterwards. Raises what the file system raises.
    """

    def __init__(self, aside: Path, final: Path, values: str, rank: int, finished: Callable[[], None]) -> None:
        self.aside, self.final, self.values, self.finished = aside, final, values, finished
        self.file = f"rank-{rank}.safetensors"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All is known already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The directory, before any rank writes; what a killed run has left goes."""
        self.aside.parent.mkdir(parents=True, exist_ok=True)
        for left in self.aside.parent.glob(f"{ASIDE}*"):
            shutil.rmtree(left)
        self.aside.mkdir()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file with all parts of this rank, flushed."""
        parts: dict[str, Tensor] = {}
        results = []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            key = _key(item.index)
            parts[key] = tensor
            results.append(WriteResult(item.index, tensor.nbytes, Place(self.file, key)))
        save_file(parts, self.aside / self.file)
        flush(self.aside / self.file)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """All ranks are done: from here on it is a checkpoint."""
        places = {result.index: result.storage_data for of_rank in results for result in of_rank}
        index = {name: _described(name, found, places) for name, found in metadata.state_dict_metadata.items()}
        (self.aside / INDEX).write_text(json.dumps(index), encoding="utf-8")
        (self.aside / VALUES).write_text(self.values, encoding="utf-8")
        for path in (self.aside / INDEX, self.aside / VALUES, self.aside):
            flush(path)
        if self.final.exists():
            shutil.rmtree(self.final)
        self.aside.rename(self.final)
        flush(self.final.parent)
        self.finished()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Made for one checkpoint: there is no other."""
        return False


class Reader(StorageReader):
    """Reads what `Writer` has written. ValueError, KeyError, OSError or SafetensorError if it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[MetadataIndex, Place] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Shapes, dtypes and parts of all tensors."""
        return Metadata({**self.tensors()})

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The same by name."""
        rows = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
        found: dict[str, TensorStorageMetadata] = {}
        for name, row in rows.items():
            chunks = []
            for part in row["parts"]:
                offsets = torch.Size(part["offsets"])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(part["shape"])))
                self.places[MetadataIndex(name, offsets)] = Place(Path(part["file"]).name, part["key"])
            properties = TensorProperties(dtype=dtype_of(row["dtype"]))
            found[name] = TensorStorageMetadata(properties, torch.Size(row["shape"]), chunks)
        return found

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """`read_metadata` has done it."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what this rank wants of each part, file by file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.places[item.storage_index].file, []).append(item)
        for name, items in by_file.items():
            with safe_open(self.path / name, framework="pt") as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_cut(file, self.places[item.storage_index].key, item))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Made for one checkpoint: there is no other."""
        return False


def save(tensors: dict[str, Tensor], planner: SavePlanner, writer: Writer, group: dist.ProcessGroup | None) -> None:
    """Write what `planner` says of `tensors`; with a group all its ranks together, who then raise CheckpointException.

    For a single process torch has the same steps behind a warning that it is one.
    """
    if group is not None:
        save_state(tensors, storage_writer=writer, planner=planner, process_group=group)
        return
    planner.set_up_planner(tensors, is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).value()])


def load(tensors: dict[str, Tensor], planner: LoadPlanner, reader: Reader, group: dist.ProcessGroup | None) -> None:
    """Read `tensors` in place, as `save`."""
    if group is not None:
        load_state(tensors, storage_reader=reader, planner=planner, process_group=group)
        return
    planner.set_up_planner(tensors, reader.read_metadata(), is_coordinator=True)
    plan = planner.finish_plan(planner.create_global_plan([planner.create_local_plan()])[0])
    reader.read_data(plan, planner).wait()


def _key(index: MetadataIndex) -> str:
    """The name of a part in its file; that of a tensor that is there in one piece is the tensor's."""
    offset = index.offset or ()
    return f"{index.fqn}@{','.join(map(str, offset))}" if any(offset) else index.fqn


def _described(name: str, found: Any, places: dict[MetadataIndex, Place]) -> dict[str, Any]:
    parts = []
    for chunk in found.chunks:
        place = places[MetadataIndex(name, chunk.offsets)]
        parts.append({"offsets": [*chunk.offsets], "shape": [*chunk.sizes], "file": place.file, "key": place.key})
    return {"dtype": str(found.properties.dtype).removeprefix("torch."), "shape": [*found.size], "parts": parts}


def _cut(file: Any, key: str, item: ReadItem) -> Tensor:
    """The box of a stored part that `item` asks for."""
    stored = file.get_slice(key)
    if [*item.lengths] == stored.get_shape():
        return file.get_tensor(key)  # type: ignore[no-any-return]  # safetensors
    box = zip(item.storage_offsets, item.lengths, strict=True)
    return stored[tuple(slice(at, at + size) for at, size in box)]  # type: ignore[no-any-return]  # safetensors


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of that name; ValueError if there is none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def flush(path: Path) -> None:
    """Make sure that what was written survives a power cut; directories hold the names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
