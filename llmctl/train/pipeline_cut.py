"""Where a model is cut into pipeline stages, what each stage has, and how much it keeps. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import count

if TYPE_CHECKING:
    from llmctl.nn.transformer import Transformer

WORDS = ("lm", "mlm", "pretraining")
"""Heads that score the vocabulary."""
FIRST = ("embedding", "positions", "segments", "embedding_norm")
"""What the first stage has beside its blocks."""
LAST = ("norm", "unembedding", "masked", "pooler", "next", "classifier", "auxiliary")
"""What the last stage has beside its blocks."""
EVERY = ("relative",)
"""What every stage reads: T5's table, from which each makes the bias of its own blocks."""
KNOWN = frozenset((*FIRST, *LAST, *EVERY, "blocks", "encoder"))


@dataclass(frozen=True)
class Stage:
    """One of `count` stages: the blocks from `start` to `stop`, and what stands before or behind them."""

    index: int
    count: int
    start: int
    stop: int

    @property
    def first(self) -> bool:
        """Whether tokens enter here."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether the loss is taken here."""
        return self.index == self.count - 1

    def children(self, model: Transformer) -> set[str]:
        """Names of the model's children that this stage holds, `blocks` aside."""
        names = {*EVERY, *(FIRST if self.first else ()), *(LAST if self.last else ())}
        if self.last and model.unembedding is None and model.config.head in WORDS:
            names.add("embedding")
        return {name for name in names if getattr(model, name) is not None}

    def names(self, model: Transformer) -> set[str]:
        """Names of the model's parameters that this stage holds."""
        children = self.children(model)
        prefixes = tuple(f"blocks.{layer}." for layer in range(self.start, self.stop))
        every = (name for name, _ in model.named_parameters())
        return {name for name in every if name.split(".")[0] in children or name.startswith(prefixes)}


def cut(config: ModelConfig, stages: int) -> list[Stage]:
    """The model in `stages` stages of consecutive blocks, the slowest as fast as can be.

    The last has fewer blocks where the head costs as much as several of them. Raises UsageError for more stages than
    blocks.
    """
    if stages > config.layers:
        raise UsageError(
            f"{config.layers} layers cannot be cut into {stages} stages",
            hint="lower parallel.pp or parallel.virtual_stages: their product is the number of stages",
        )
    if stages == 1:
        return [Stage(0, 1, 0, config.layers)]
    block = count(config).blocks / config.layers
    head = config.vocab_size * config.dim if config.head in WORDS else 0
    most = config.layers - stages + 1

    def slowest(last: int) -> float:
        return max(block * math.ceil((config.layers - last) / (stages - 1)), block * last + head)

    last = min(range(1, most + 1), key=lambda blocks: (slowest(blocks), -blocks))
    before = config.layers - last
    ends = [before * index // (stages - 1) for index in range(stages)] + [config.layers]
    return [Stage(index, stages, ends[index], ends[index + 1]) for index in range(stages)]


def in_flight(schedule: str, ranks: int, rank: int, micro_batches: int, virtual: int = 1) -> float:
    """The most micro-batches whose activations `rank` keeps at once, each counted by the share of its stages."""
    if schedule == "gpipe":
        return micro_batches
    if schedule == "1f1b":
        return min(ranks - rank, micro_batches)
    rounds = max(1, micro_batches // ranks)
    ahead = (virtual - 1) * (micro_batches // rounds) + 2 * (ranks - 1 - rank)
    return min(ahead + 1, virtual * micro_batches) / virtual
