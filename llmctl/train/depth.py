"""Where a model is cut into pipeline stages. Free of torch, so that a plan knows it too."""

from __future__ import annotations

import math

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import count

WORDS = ("lm", "mlm", "pretraining")
"""Heads that score the vocabulary."""


def borders(config: ModelConfig, stages: int) -> list[int]:
    """The blocks at which `stages` stages begin, and where the last ends: the slowest stage is as fast as can be.

    The last has fewer blocks where the head costs as much as several of them. Raises UsageError for more stages than
    blocks.
    """
    if stages > config.layers:
        raise UsageError(
            f"{config.layers} layers cannot be cut into {stages} stages",
            hint="lower parallel.pp or parallel.virtual_stages: their product is the number of stages",
        )
    if stages == 1:
        return [0, config.layers]
    block = count(config).blocks / config.layers
    head = config.vocab_size * config.dim if config.head in WORDS else 0
    most = config.layers - stages + 1

    def slowest(last: int) -> float:
        return max(block * math.ceil((config.layers - last) / (stages - 1)), block * last + head)

    last = min(range(1, most + 1), key=lambda blocks: (slowest(blocks), -blocks))
    before = config.layers - last
    return [before * index // (stages - 1) for index in range(stages)] + [config.layers]
