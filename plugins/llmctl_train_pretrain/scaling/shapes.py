"""From a number of parameters to a model: the shape whose count comes nearest by a rule of depth and width."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmctl.errors import UsageError
from llmctl.nn.config import TRAITS, ModelConfig
from llmctl.nn.counts import Parameters, count, training_flops
from llmctl.nn.presets import PRESETS, preset, preset_names

WIDEST = 128
"""Width over depth of GPT-3 and LLaMA 7B."""
TENTH = 0.1
"""A count off by this share is as bad as proportions off by the factor e."""
DEEPEST = 160
NEAR = 2.0
"""A named model further away than by this factor is not worth naming."""

COUNTED: dict[str, Callable[[Parameters, ModelConfig], int]] = {
    "total": lambda found, config: found.total,
    "without-embedding": lambda found, config: found.without_embedding,
    "with-head": lambda found, config: found.without_embedding + config.vocab_size * config.dim,
}
"""How `published.COUNTS` count a configuration."""


@dataclass(frozen=True)
class Shape:
    """A configuration with its exact counts."""

    config: ModelConfig
    counted: int
    """What the law counts."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.config.parameters()

    def flops(self, tokens: float) -> float:
        """Operations of a training, attention over the context included (`llmctl.nn.counts.training_flops`)."""
        return training_flops(self.config, self.config.context) * tokens


def nearest_shape(
    parameters: float, *, family: str, vocab_size: int, context: int, counts: str, aspect: float | None = None
) -> Shape:
    """The depth and width that are near to both: `parameters`, and a width / depth of `aspect`, or the usual one.

    Heads are 16 to 128 wide, growing with the width; the rest is the family's. UsageError for one that is no decoder.
    """
    if family not in TRAITS or TRAITS[family].kind != "decoder":
        decoders = [name for name, traits in TRAITS.items() if traits.kind == "decoder"]
        raise UsageError(f"{family!r} is no family of decoders", hint=f"one of {', '.join(decoders)}")

    def make(layers: int, dim: int) -> Shape:
        heads = dim // _head_width(dim)
        config = ModelConfig(arch=family, vocab_size=vocab_size, dim=dim, layers=layers, heads=heads, context=context)
        return Shape(config, COUNTED[counts](count(config), config))

    wanted = usual_aspect(parameters) if aspect is None else aspect
    shapes = [shape for layers in range(1, DEEPEST + 1) for shape in _around(parameters, layers, make)]

    def badness(shape: Shape) -> float:
        proportions = math.log(shape.config.dim / shape.config.layers / wanted)
        return abs(math.log(shape.counted / parameters)) / TENTH + abs(proportions)

    return min(shapes, key=badness)


def usual_aspect(parameters: float) -> float:
    """Width over depth that models of a size have: 32 at a million, 58 at 124 M (GPT-2 small: 64), 95 at 7 B.

    The loss hardly depends on it over a wide range (2001.08361, figure 5).
    """
    return float(min(WIDEST, 100 * (parameters / 1e10) ** 0.125))


def _around(parameters: float, layers: int, make: Callable[[int, int], Shape]) -> Iterator[Shape]:
    """The two widths of a depth between which the count passes `parameters`."""
    low, high = 0, len(_WIDTHS) - 1
    while low < high:
        middle = (low + high) // 2
        if make(layers, _WIDTHS[middle]).counted < parameters:
            low = middle + 1
        else:
            high = middle
    for index in {max(0, low - 1), low}:
        yield make(layers, _WIDTHS[index])


_WIDTHS = (*range(16, 256, 16), *range(256, 2048, 64), *range(2048, 65_536 + 1, 128))


def _head_width(dim: int) -> int:
    if dim >= 2048:
        return 128
    if dim >= 256:
        return 64
    return 32 if dim % 32 == 0 else 16


def nearest_preset(parameters: float, *, vocab_size: int, counts: str) -> tuple[str, Shape] | None:
    """The named decoder whose count is nearest; None if all are further than by a factor of NEAR.

    Small presets have this vocabulary, published models their own.
    """

    def distance(name: str) -> float:
        return abs(math.log(found[name].counted / parameters))

    found = {}
    for name in preset_names():
        config = preset(name, vocab_size=vocab_size if name in PRESETS else None)
        if config.traits.kind == "decoder":
            found[name] = Shape(config, COUNTED[counts](count(config), config))
    name = min(found, key=distance)
    return (name, found[name]) if distance(name) <= math.log(NEAR) else None
