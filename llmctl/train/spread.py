"""The model as `parallel` spreads it over the ranks: wrapped, called, its gradients reduced and clipped, put together.

Data parallelism averages gradients over the shares of the batch (DDP, or FSDP2 where each rank keeps a part), so a loss
is multiplied by their number before. Clipping comes after every reduction, by the norm of the whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmctl.nn.transformer import Block, Transformer
from llmctl.train.batches import Batch
from llmctl.train.context_parallel import cut_sequences, require_cut, share
from llmctl.train.device import Compute
from llmctl.train.objectives import CausalLM, Objective
from llmctl.train.padding import alike
from llmctl.train.parts import gathered, local
from llmctl.train.pipeline_schedules import Pipeline
from llmctl.train.ranks import Ranks
from llmctl.train.tensor_parallel import sees_own_heads, split_layers

T = TypeVar("T")


class _Whole(nn.Module):
    """A model behind `forward`, to which the wrappers of torch attach: they work around any call of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[nn.Module], T]) -> T:
        """What `call` returns of the model."""
        return call(self.model)


class Spread:
    """`model` as this rank has it, on the device of `compute`; without one it stays where it is.

    With `parallel.shards` its parameters are DTensors, each rank's part of them. With `parallel.pp` it is a Relay, and
    the model that was given lacks what other ranks hold until `give_back`.
    """

    def __init__(
        self, model: Transformer, ranks: Ranks, compute: Compute | None = None, objective: Objective | None = None
    ) -> None:
        self.ranks = ranks
        self.pipeline: Pipeline | None = None
        parallel, mesh = ranks.parallel, ranks.mesh
        if parallel.cp > 1:
            require_cut(model, objective or CausalLM())
        if parallel.pp > 1:
            self.pipeline = Pipeline(
                model,
                ranks.group("pp"),
                parallel.pp_schedule,
                parallel.virtual_stages,
                autocast=nullcontext if compute is None else compute.autocast,
            )
        self.model = model if self.pipeline is None else self.pipeline.relay
        if compute is not None:
            self.model.to(compute.device)
        self._root: nn.Module = _Whole(self.model)
        if mesh is None:
            return
        if parallel.cp > 1:
            cut_sequences(self.model, ranks.group("cp"))
        if self.pipeline is None:
            self._wrap(self.model, mesh)

    def _wrap(self, model: Transformer, mesh: DeviceMesh) -> None:
        parallel, ranks = self.ranks.parallel, self.ranks
        if parallel.tp > 1:
            split_layers(model, mesh["tp"])
        if parallel.dp_shard > 1 or (parallel.tp > 1 and ranks.token_ranks > 1):
            # Parts of sequences are one more reason to add gradients up; whoever does can hold a part of the weights.
            sharded = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
            dp = mesh["dp_replicate", "dp_shard_cp"] if parallel.dp_replicate > 1 else sharded
            for block in [module for module in model.modules() if isinstance(module, Block)]:
                fully_shard(block, mesh=dp, reshard_after_forward=parallel.reshard_after_forward)
            fully_shard(self._root, mesh=dp, reshard_after_forward=False)
        elif ranks.token_ranks > 1:
            known = isinstance(model, Transformer) and model.config.head == "lm"
            self._root = DistributedDataParallel(
                self._root,
                process_group=ranks.group("tokens"),
                forward_sync_buffers=False,
                find_unused_parameters=not known,  # of the other heads some may have nothing to learn from a batch
                gradient_as_bucket_view=True,
            )

    def __call__(self, call: Callable[[Transformer], T]) -> T:
        """`call(model)` with the weights there. Every rank must make the same calls in the same order."""
        return self._root(call)  # type: ignore[no-any-return]

    def shares(self, batches: list[Batch]) -> list[Batch]:
        """What this rank computes of its data rank's `batches`: all, or a part of each sequence."""
        if self.ranks.parallel.cp == 1:
            return batches
        if self.pipeline is not None:
            batches = alike(batches)  # before they are cut: filled up later, the parts would be those of no sequence
        return [share(batch, self.ranks.place("cp"), self.ranks.parallel.cp) for batch in batches]

    def look(self, call: Callable[[Transformer], T]) -> T:
        """The same without gradients, on one's own with whole weights."""
        if self.pipeline is not None:
            with torch.no_grad(), self.pipeline.relay.answering():
                return call(self.model)
        if not isinstance(self._root, FSDPModule):
            return call(self.model)
        found = self._root(call)
        for module in self._root.modules():  # no backward pass will do it
            if isinstance(module, FSDPModule):
                module.reshard()
        return found  # type: ignore[no-any-return]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around a forward and backward pass: plain data parallelism reduces after the `last` of a step alone."""
        if isinstance(self._root, DistributedDataParallel) and not last:
            with self._root.no_sync():
                yield
        else:
            yield

    def reduce(self) -> None:
        """Finish the gradients after the last backward pass of a step: tensor parallelism leaves sums over ranks, and
        stages are not wrapped."""
        if self.pipeline is not None and self.ranks.token_ranks > 1:
            self.pipeline.average(self.ranks.group("tokens"))
        if self.ranks.parallel.tp == 1 or self.ranks.mesh is None:
            return
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            if grad is not None and sees_own_heads(name):
                dist.all_reduce(local(grad), group=self.ranks.group("tp"))
            elif isinstance(grad, DTensor) and isinstance(parameter, DTensor):
                parameter.grad = grad.redistribute(placements=parameter.placements)

    def clip(self, most: float) -> Tensor:
        """Scale the gradient down to the norm `most` (0: any); returns its norm before that, equal on all ranks."""
        if self.pipeline is not None:
            return self.pipeline.clip(most or math.inf)
        if not self.ranks.parallel.shards:
            return nn.utils.clip_grad_norm_(self.model.parameters(), most or math.inf)
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = whole_norm(grads)
        if most:
            share = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
            for grad in grads:
                local(grad).mul_(share.to(grad.dtype))
        return norm

    @property
    def size(self) -> int:
        """Parameters of the whole model."""
        if self.pipeline is not None:
            return self.pipeline.relay.total
        return sum(parameter.numel() for parameter in self.model.parameters())

    def holds(self, name: str) -> bool:
        """Whether a tensor of a checkpoint, `<kind>/<parameter>` or `<kind>/<parameter>/<key>`, is of this rank."""
        if self.pipeline is None:
            return True
        relay = self.pipeline.relay
        return relay.rank in relay.holders.get(name.split("/")[1], [relay.rank])

    def give_back(self, into: nn.Module) -> None:
        """Put the whole weights into the model `into`, which is the given one or a copy, on rank 0; all must call."""
        if self.pipeline is not None:
            self.pipeline.relay.reunite()
        elif into is not self.model:
            collect(self.model, into, self.ranks.main)


def whole_norm(grads: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, float64; parts are added up over the ranks that hold them."""
    squares: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for grad in grads:
        groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(grad, DTensor):
            spread = [dim for dim, placement in enumerate(grad.placements) if not placement.is_replicate()]
            groups = tuple(grad.device_mesh.get_group(dim) for dim in spread)
        squares.setdefault(groups, []).append(torch.linalg.vector_norm(local(grad)).double().square())
    total: Tensor | None = None
    for groups, parts in squares.items():
        part = torch.stack(parts).sum()
        for group in groups:
            dist.all_reduce(part, group=group)
        total = part if total is None else total + part
    assert total is not None
    return total.sqrt()


def collect(spread: nn.Module, into: nn.Module, main: bool) -> None:
    """Put the whole weights of `spread` into the model `into` on the CPU, on rank `main` alone; all ranks must call."""
    targets = into.state_dict()
    for name, tensor in spread.state_dict().items():
        whole = gathered(tensor)
        if main:
            targets[name].copy_(whole)
