"""The processes that train one model together: who this one is, which share of the batch it has, sums over all.

Everything here follows from the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
and from `parallel` in the parameters. With one process nothing is set up and every sum is what it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmctl.errors import MachineError, TempFail
from llmctl.train.parallel import ParallelParams

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Of the mesh, from the slowest network to the fastest: neighbouring ranks share a layer."""
DATA = ("dp_replicate", "dp_shard")
"""Dimensions along which the batch is shared."""
TOKENS = (*DATA, "cp")
"""Dimensions along which processes see other tokens, so that losses and gradients add up."""


def world_size() -> int:
    """Processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(kind: str) -> torch.device:
    """The device of this process: of several on a machine, each has the GPU of its number there."""
    if kind != "cuda" or world_size() == 1:
        return torch.device(kind)
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise MachineError(
            f"process {number + 1} of this machine has no GPU, there are {there}",
            hint="lower parallel, or start fewer processes per machine",
        )
    return torch.device(kind, number)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. `mesh` is None for a single one."""

    parallel: ParallelParams
    mesh: DeviceMesh | None = None
    rank: int = 0
    """Number of this process among all."""

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """Shares that the batch is cut into."""
        return self.parallel.data

    @property
    def data_rank(self) -> int:
        """Which of the shares is this process's."""
        return 0 if self.mesh is None else self.place("dp_replicate") * self.parallel.dp_shard + self.place("dp_shard")

    @property
    def token_ranks(self) -> int:
        """Processes that see other tokens of a batch each: shares of the batch, and parts of their sequences."""
        return self.data_ranks * self.parallel.cp

    @property
    def token_rank(self) -> int:
        """Which of them this is."""
        return self.data_rank * self.parallel.cp + self.place("cp")

    @property
    def stream(self) -> int:
        """Which random numbers this process draws: others where it sees other tokens or has other layers."""
        return self.token_rank + self.token_ranks * self.place("pp")

    def place(self, dimension: str) -> int:
        """Where this process stands along a dimension of the mesh."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(dimension)

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The processes along one dimension, or along `tokens`: all that see other tokens of the batch."""
        assert self.mesh is not None
        if dimension == "tokens":
            return self.mesh[TOKENS]._flatten("tokens").get_group()
        return self.mesh.get_group(dimension)

    def counted(self, *numbers: int) -> list[int]:
        """The sums of whole numbers over all tokens of the batch. They stay on the host: no GPU is waited for."""
        if self.token_ranks == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(sums, group=self.group("tokens"))
        return sums.tolist()

    def summed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """0-dimensional tensors of equal names, in float64, summed over all tokens of the batch on the device."""
        if self.token_ranks == 1 or not values:
            return dict(values)
        stacked = torch.stack([value.detach().double() for value in values.values()])
        dist.all_reduce(stacked, group=self.group("tokens"))
        return dict(zip(values, stacked.unbind(), strict=True))

    def most(self, number: int) -> int:
        """The largest number that a process says; every one gets the same answer in the same step."""
        if self.mesh is None:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Until every process is here."""
        if self.mesh is not None:
            self.most(0)  # on the host: a barrier of NCCL would occupy the GPU


ALONE = Ranks(ParallelParams())


@contextmanager
def joined(parallel: ParallelParams, device: torch.device) -> Iterator[Ranks]:
    """The process group and its mesh inside; MachineError if other numbers of processes were started than are wanted.

    At the end all wait for each other and then take the group down one call after the other: left to the interpreter's
    own end, about one process in twenty aborts there. After an error nobody waits for processes that may be gone.
    """
    found = world_size()
    if found != parallel.world:
        raise MachineError(
            f"parallel asks for {parallel.world} processes, {found} were started",
            hint="`llmctl run` starts as many as it says; by hand: torchrun --nproc-per-node",
        )
    if found == 1:
        yield Ranks(parallel)
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    sizes: Sequence[int] = [getattr(parallel, name) for name in DIMENSIONS]
    ranks = Ranks(parallel, init_device_mesh(device.type, tuple(sizes), mesh_dim_names=DIMENSIONS), dist.get_rank())
    try:
        yield ranks
    except TempFail:  # agreed by all
        _leave(ranks)
        raise
    _leave(ranks)


def _leave(ranks: Ranks) -> None:
    ranks.wait()
    dist.destroy_process_group()
