"""The model as `parallel` spreads it over the ranks: wrapped, called, its gradients reduced and clipped, put together.

Data parallelism averages gradients over the shares of the batch (DDP, or FSDP2 where each rank keeps a part), so a loss
is multiplied by their number before. Clipping comes after every reduction, by the norm of the whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmctl.nn.transformer import Block, Transformer
from llmctl.train.parts import gathered, local
from llmctl.train.ranks import DATA, Ranks
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
    """`model` as this rank has it. With `parallel.shards` its parameters are DTensors, each rank's part of them."""

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self._root: nn.Module = _Whole(model)
        parallel, mesh = ranks.parallel, ranks.mesh
        if mesh is None:
            return
        if parallel.tp > 1:
            split_layers(model, mesh["tp"])
        if parallel.dp_shard > 1 or (parallel.tp > 1 and parallel.dp_replicate > 1):
            dp = mesh[DATA] if parallel.dp_replicate > 1 else mesh["dp_shard"]
            for block in [module for module in model.modules() if isinstance(module, Block)]:
                fully_shard(block, mesh=dp, reshard_after_forward=parallel.reshard_after_forward)
            fully_shard(self._root, mesh=dp, reshard_after_forward=False)
        elif parallel.dp_replicate > 1:
            known = isinstance(model, Transformer) and model.config.head == "lm"
            self._root = DistributedDataParallel(
                self._root,
                process_group=ranks.group("dp_replicate"),
                forward_sync_buffers=False,
                find_unused_parameters=not known,  # of the other heads some may have nothing to learn from a batch
                gradient_as_bucket_view=True,
            )

    def __call__(self, call: Callable[[Transformer], T]) -> T:
        """`call(model)` with the weights there. Every rank must make the same calls in the same order."""
        return self._root(call)  # type: ignore[no-any-return]

    def look(self, call: Callable[[Transformer], T]) -> T:
        """The same without gradients, on one's own with whole weights."""
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
        """Finish the gradients after the last backward pass of a step: tensor parallelism leaves sums over ranks."""
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
        if not self.ranks.parallel.shards:
            return nn.utils.clip_grad_norm_(self.model.parameters(), most or math.inf)
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = whole_norm(grads)
        if most:
            share = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
            for grad in grads:
                local(grad).mul_(share.to(grad.dtype))
        return norm


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
