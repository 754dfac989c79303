"""How one training is spread over processes. Free of torch; every misfit that parameters show is refused with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    def shards(self) -> bool:
        """Whether a process holds the weights in part."""
        return self.dp_shard * self.tp > 1

    @model_validator(mode="after")
    def _check(self) -> ParallelParams:
        for name, kind in (("cp", "context"), ("pp", "pipeline")):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} {getattr(self, name)}: {kind} parallelism is not there yet, set {name} to 1")
        if self.shard_optimizer and self.dp_replicate == 1:
            raise ValueError("shard_optimizer needs dp_replicate above 1: there is nobody to share the state with")
        if self.shard_optimizer and self.shards:
            raise ValueError("shard_optimizer goes with dp_replicate alone; dp_shard parts the state already")
        return self


def misfit(params: TrainParams) -> str:
    """Why these parameters cannot be trained as `parallel` says, empty if they can."""
    parallel = params.parallel
    if params.batch_size % parallel.data:
        return f"batch_size {params.batch_size} is not divisible by the {parallel.data} processes that share it"
    if parallel.world > 1 and params.micro_batch == "auto":
        return "micro_batch auto is for one process: with several give a number"
    if parallel.shards and params.optimizer == "adamw8bit":
        return "adamw8bit cannot be parted by dp_shard or tp: use dp_replicate with shard_optimizer, or adamw"
    if parallel.shards and params.offload_optimizer:
        return "offload_optimizer is for whole weights: leave it off with dp_shard or tp"
    if parallel.shard_optimizer and params.offload_optimizer:
        return "offload_optimizer and shard_optimizer exclude each other"
    if parallel.tp > 1 and (params.compile or params.precision == "fp8"):
        return f"{'compile' if params.compile else 'precision fp8'} does not go with tp"
    return ""
