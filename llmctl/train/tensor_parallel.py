"""Tensor parallelism: every rank computes some heads and feed-forward channels of each layer (1909.08053).

Queries, keys, values and what goes into the feed-forward layer are cut by output, `out` and `down` by input, so that a
block adds up over the ranks twice. The vocabulary of the embedding and of the head is cut too; a tied one once.
"""

from __future__ import annotations

import types

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from llmctl.errors import UsageError
from llmctl.nn.transformer import Attention, FeedForward, Transformer

BY_OUTPUT = ("q", "k", "v", "gate", "up", "value_embedding", "value_gate")
BY_INPUT = ("out", "down")
WHOLE = ("q_norm", "k_norm")
"""Parts of attention that every rank keeps: they are the same for all heads."""
POSITIONS = ("rope", "learned", "sinusoidal", "none")
"""Those that say nothing about single heads."""


def split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make the layers of `model` this rank's part, in place; UsageError for a shape that cannot be cut so."""
    check(model, mesh.size())
    assert isinstance(model, Transformer)
    for module in [module for module in model.modules() if isinstance(module, Attention | FeedForward)]:
        plan: dict[str, ParallelStyle] = {}
        for name, _ in module.named_children():
            if name in BY_OUTPUT:
                plan[name] = ColwiseParallel()
            elif name in BY_INPUT:
                plan[name] = RowwiseParallel()
            elif name not in WHOLE:
                raise UsageError(f"tensor parallelism does not know the layer {name}", hint="set parallel.tp to 1")
        parallelize_module(module, mesh, plan)
    parallelize_module(model, mesh, {"embedding": RowwiseParallel(input_layouts=Replicate())})
    if model.unembedding is not None:
        weight = model.unembedding.weight
        model.unembedding.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None))
    if model.masked is not None:
        distribute_module(model.masked, mesh)
    _split_head(model, mesh)


def sees_own_heads(name: str) -> bool:
    """Whether a parameter, whole on every rank, sees this rank's heads alone: its gradient is a part of a sum."""
    return any(part in WHOLE for part in name.split("."))


def check(model: nn.Module, ranks: int) -> None:
    """UsageError unless heads and channels can be cut into `ranks` equal parts and nothing else depends on them."""
    if not isinstance(model, Transformer):
        raise UsageError(
            "tensor parallelism is of llmctl's own transformer, this one is computed by transformers",
            hint="set parallel.tp to 1",
        )
    config = model.config
    for name, size in (("heads", config.heads), ("kv_heads", config.kv_heads), ("ff_dim", config.ff_dim)):
        if size % ranks:
            raise UsageError(
                f"{name} {size} cannot be cut into {ranks} parts", hint=f"{name} must be a multiple of parallel.tp"
            )
    if config.traits.positions not in POSITIONS:
        raise UsageError(
            f"tensor parallelism does not know {config.traits.positions} positions", hint="set parallel.tp to 1"
        )
    if "boundary" in model.auxiliary:
        raise UsageError("tensor parallelism does not know the boundary objective", hint="set parallel.tp to 1")


def _split_head(model: Transformer, mesh: DeviceMesh) -> None:
    """The head computes the logits of this rank's part of the vocabulary, and gathers the others'."""
    of_parts = model.head

    def head(self: Transformer, hidden: Tensor) -> Tensor:
        logits = of_parts(DTensor.from_local(hidden, mesh, [Replicate()], run_check=False))
        return logits.full_tensor() if isinstance(logits, DTensor) else logits

    model.head = types.MethodType(head, model)  # type: ignore[method-assign]  # of this one model
