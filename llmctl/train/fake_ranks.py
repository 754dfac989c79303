"""What each of many ranks would hold, found without any of them: the model is spread for good, but has no contents.

The process group is torch's fake one and the weights are on the meta device. So a plan for thousands of ranks is tried
on a laptop in seconds: whether heads, channels and vocabulary can be cut so, and how much is left for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.train.parallel import ParallelParams
from llmctl.train.parts import local
from llmctl.train.ranks import DIMENSIONS, Ranks
from llmctl.train.spread import Spread


@dataclass(frozen=True)
class Held:
    """Weights of a model, and those of them that one rank holds between two steps. Gradients are as many."""

    all: int
    own: int
    shapes: dict[str, tuple[int, ...]]
    """Of the rank's parts, by parameter."""


def held(config: ModelConfig, parallel: ParallelParams, rank: int = 0) -> Held:
    """What `rank` holds. Of the ranks with the same layers the first hold most where parts are uneven.

    UsageError for a model that cannot be cut as `parallel` says. No process group may exist.
    """
    with torch.device("meta"):
        model = Transformer(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    if parallel.shards or parallel.pp > 1:
        model = _spread(model, parallel, rank)
    parts = {name: local(parameter.detach()) for name, parameter in model.named_parameters()}
    return Held(whole, sum(part.numel() for part in parts.values()), {n: tuple(p.shape) for n, p in parts.items()})


def _spread(model: Transformer, parallel: ParallelParams, rank: int) -> Transformer:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=parallel.world, store=FakeStore())
    try:
        sizes = tuple(getattr(parallel, name) for name in DIMENSIONS)
        return Spread(model, Ranks(parallel, init_device_mesh("cpu", sizes, mesh_dim_names=DIMENSIONS), rank)).model
    finally:
        dist.destroy_process_group()
