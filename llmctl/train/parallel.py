"""How one training is spread over processes. Free of torch; every misfit that parameters show is refused with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params

if TYPE_CHECKING:
    from llmctl.train.params import TrainParams


class ParallelParams(Params):
    """The sizes of a mesh of processes, one per GPU. Their product is how many are started.

    Plain data parallelism is `dp_replicate`; with `shard_optimizer` it is ZeRO-1, `dp_shard` is ZeRO-3 (FSDP2) and,
    without `reshard_after_forward`, ZeRO-2 (1910.02054).
    """

    dp_replicate: int = Field(
        1,
        ge=1,
        affects="nothing",
        description="Groups of processes that each hold the whole model and share the batch.",
    )
    dp_shard: int = Field(
        1,
        ge=1,
        affects="nothing",
        description="Processes that share the batch and hold a part each of weights, gradients and optimizer state.",
    )
    tp: int = Field(
        1, ge=1, affects="nothing", description="Processes that each compute some heads and channels of every layer."
    )
    cp: int = Field(1, ge=1, affects="nothing", description="Processes that each compute a part of every sequence.")
    pp: int = Field(1, ge=1, affects="nothing", description="Processes that each compute some of the layers.")
    pp_schedule: Literal["gpipe", "1f1b", "interleaved"] = Field(
        "1f1b",
        affects="nothing",
        description="With pp: `gpipe` computes all micro-batches forward, then all backward; `1f1b` alternates, keeps "
        "fewer activations; `interleaved` is 1f1b with several stages per process, which wait less.",
    )
    virtual_stages: int = Field(
        1, ge=1, affects="nothing", description="Stages per process of the schedule `interleaved`; 1 for the others."
    )
    shard_optimizer: bool = Field(
        False, affects="nothing", description="With dp_replicate: each process keeps a part of the optimizer's state."
    )
    reshard_after_forward: bool = Field(
        True,
        affects="nothing",
        description="With dp_shard: give the gathered weights up after the forward pass and gather them again for the "
        "backward pass. Off: more memory, less traffic.",
    )
    max_restarts: int = Field(
        3, ge=0, affects="nothing", description="How often all processes are started anew after one was killed."
    )

    @property
    def data(self) -> int:
        """Processes, or groups of them, that each take a share of the batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """Processes."""
        return self.data * self.tp * self.cp * self.pp

    @property
    def changes(self) -> bool:
        """Whether the model is made into something else that cannot be undone in place."""
        return self.shards or (self.cp > 1 and self.pp == 1)

    @property
    def shards(self) -> bool:
        """Whether a process holds the weights in part."""
        return self.dp_shard * self.tp > 1

    @model_validator(mode="after")
    def _check(self) -> ParallelParams:
        if (self.pp_schedule == "interleaved") != (self.virtual_stages > 1):
            raise ValueError(
                f"pp_schedule {self.pp_schedule} with virtual_stages {self.virtual_stages}: `interleaved` needs 2 or "
                "more, the others have 1"
            )
        if self.virtual_stages > 1 and self.pp == 1:
            raise ValueError(f"virtual_stages {self.virtual_stages} needs pp above 1")
        if self.pp > 1 and (self.shards or self.shard_optimizer):
            raise ValueError("pp goes with dp_replicate and cp, not with dp_shard, tp or shard_optimizer")
        if self.shard_optimizer and self.dp_replicate == 1:
            raise ValueError("shard_optimizer needs dp_replicate above 1: there is nobody to share the state with")
        if self.shard_optimizer and (self.shards or self.cp > 1):
            raise ValueError("shard_optimizer goes with dp_replicate alone; dp_shard parts the state already")
        return self


def misfit(params: TrainParams) -> str:
    """Why these parameters cannot be trained as `parallel` says, empty if they can."""
    parallel = params.parallel
    if params.batch_size % parallel.data:
        return f"batch_size {params.batch_size} is not divisible by the {parallel.data} processes that share it"
    if parallel.world > 1 and params.micro_batch == "auto":
        return "micro_batch auto is for one process: with several give a number"
    if parallel.pp > 1 and (reason := schedule_misfit(parallel.pp_schedule, parallel.pp, params.micro_batches)):
        return reason
    if parallel.pp * parallel.cp > 1 and (params.compile or params.precision == "fp8"):
        return f"{'compile' if params.compile else 'precision fp8'} does not go with pp or cp"
    if parallel.cp > 1 and params.attention != "sdpa":
        return f"the attention backend {params.attention} cannot reach across the processes of cp: use sdpa"
    if parallel.shards and params.optimizer == "adamw8bit":
        return "adamw8bit cannot be parted by dp_shard or tp: use dp_replicate with shard_optimizer, or adamw"
    if parallel.shards and params.offload_optimizer:
        return "offload_optimizer is for whole weights: leave it off with dp_shard or tp"
    if parallel.shard_optimizer and params.offload_optimizer:
        return "offload_optimizer and shard_optimizer exclude each other"
    if parallel.shard_optimizer and params.optimizer == "schedule-free":
        return "schedule-free needs all of its state for the mean of the weights: dp_shard instead of shard_optimizer"
    if parallel.tp > 1 and (params.compile or params.precision == "fp8"):
        return f"{'compile' if params.compile else 'precision fp8'} does not go with tp"
    return ""


def bubble_share(ranks: int, micro_batches: int, virtual: int = 1) -> float:
    """How long a process of a pipeline waits in a step, over how long it computes (2104.04473, section 2.2).

    All stages are taken to be equally fast; `virtual` is the number of stages per process.
    """
    return (ranks - 1) / (virtual * micro_batches)


def schedule_misfit(schedule: str, ranks: int, micro_batches: int) -> str:
    """Why the schedule cannot work with so many micro-batches per step, empty if it can."""
    if schedule != "gpipe" and micro_batches < ranks:
        return (
            f"{micro_batches} micro-batches per step are too few for pp {ranks} and pp_schedule {schedule}: lower "
            "micro_batch, raise batch_size, or choose gpipe"
        )
    rounds = max(1, micro_batches // ranks)
    if schedule == "interleaved" and micro_batches % rounds:
        return (
            f"{micro_batches} micro-batches per step cannot be interleaved: change micro_batch or batch_size so that "
            f"they are a multiple of pp {ranks}"
        )
    return ""


PER_STAGE = 4
"""Micro-batches per stage of a pipeline if nobody says how many: a process then waits a fifth of its time at most."""


def sequences_at_once(share: int, ranks: int) -> int:
    """How many of a share of the batch go through a pipeline of `ranks` at a time if nobody says so.

    The most that give `PER_STAGE` micro-batches per process and an equal number of rounds, else one.
    """
    fitting = (n for n in range(share, 0, -1) if share % n == 0 and share // n >= PER_STAGE * ranks)
    return next((n for n in fitting if share // n % ranks == 0), 1)
