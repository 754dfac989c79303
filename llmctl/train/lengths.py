"""Loss by position, beyond the context that a model was trained with: whether its positions reach further."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from llmctl.errors import InputError, UsageError
from llmctl.nn.config import RopeScaling
from llmctl.nn.transformer import Transformer

Scaling = Literal["linear", "ntk", "dynamic", "yarn"]
STRETCHES = 32
"""Most points of a curve."""
CHUNK = 256
"""Positions whose logits are in memory at a time."""


@dataclass(frozen=True)
class Stretch:
    """The mean loss over neighbouring positions; `first` and `last` count the predicted tokens from 0."""

    first: int
    last: int
    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """e to the nats."""
        return math.exp(min(self.nats, 700.0))


@dataclass(frozen=True)
class Curve:
    """Loss by position of one model on some rows, all of one length."""

    name: str
    context: int
    """What the model was trained with."""
    stretches: tuple[Stretch, ...]

    def mean(self, first: int, last: int) -> float:
        """Nats per token over the stretches within these positions; NaN where there are none."""
        inside = [part for part in self.stretches if first <= part.first and part.last <= last]
        tokens = sum(part.tokens for part in inside)
        return sum(part.nats * part.tokens for part in inside) / tokens if tokens else math.nan

    @property
    def trained(self) -> float:
        """Nats per token in the second half of the context, where the past is as long as training knows it."""
        return self.mean(self.context // 2, self.context - 1)

    @property
    def beyond(self) -> float:
        """Nats per token behind the context; NaN if the rows do not reach there."""
        return self.mean(self.context, self.stretches[-1].last)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, with null where there is no number."""
        means = {"nats_trained": self.trained, "nats_beyond": self.beyond}
        return {
            "name": self.name,
            "context": self.context,
            **{key: None if math.isnan(value) else value for key, value in means.items()},
            "stretches": [{**asdict(part), "perplexity": part.perplexity} for part in self.stretches],
        }


def at_length(model: Transformer, context: int, scaling: RopeScaling | None = None) -> Transformer:
    """The same weights under another `context`, with another scaling of rotary positions if one is given.

    The weights are shared. Raises UsageError where positions are learned and the table ends before `context`, and for a
    `scaling` of positions that are not rotary.
    """
    config = model.config
    if config.traits.positions == "learned" and context > config.context:
        raise UsageError(
            f"the model's learned positions end at {config.context}, {context} tokens have none",
            hint="measure within the context, or train with another position encoding",
        )
    changes: dict[str, Any] = {"context": context} if config.traits.positions != "learned" else {}
    if scaling is not None:
        changes["rope_scaling"] = scaling
    return reshaped(model, changes)


def reshaped(model: Transformer, changes: dict[str, Any]) -> Transformer:
    """The same weights, shared, under a configuration with `changes` that no weight depends on."""
    with torch.device("meta"):
        other = Transformer(replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.train(model.training)


def length_curves(model: Transformer, rows: Sequence[np.ndarray], scalings: Sequence[Scaling] = ()) -> list[Curve]:
    """The curve of a decoder on `rows` of one length, and one for every way of scaling its rotary positions.

    Each scales by what the rows need: their length over the context. Raises UsageError for models that are no decoder,
    and as `at_length`.
    """
    config, length = model.config, len(rows[0])
    if config.traits.kind != "decoder":
        raise UsageError(f"{config.arch} is no decoder: it has no loss of the next token", hint="choose a decoder")
    curves = [
        Curve("as trained", config.context, loss_by_position(at_length(model, max(length, config.context)), rows))
    ]
    factor = max(1.0, length / config.context)
    for kind in scalings:
        scaling = RopeScaling(kind=kind, factor=factor, original_context=config.context)
        longer = at_length(model, max(length, config.context), scaling)
        curves.append(Curve(f"{kind} x{factor:g}", config.context, loss_by_position(longer, rows)))
    return curves


@torch.inference_mode()
def loss_by_position(model: Transformer, rows: Sequence[np.ndarray]) -> tuple[Stretch, ...]:
    """Mean loss of the tokens at positions 1, 2, … of `rows`, in at most STRETCHES stretches of equal width."""
    length, device = len(rows[0]), model.embedding.weight.device
    total = np.zeros(length - 1)
    model.eval()
    for row in rows:
        tokens = torch.from_numpy(np.asarray(row, dtype=np.int64)).to(device)[None]
        hidden = model.hidden(tokens)[0]
        for start in range(0, length - 1, CHUNK):
            stop = min(start + CHUNK, length - 1)
            logits = model.head(hidden[start:stop]).float()
            losses = F.cross_entropy(logits, tokens[0, start + 1 : stop + 1], reduction="none")
            total[start:stop] += losses.double().cpu().numpy()
    width = math.ceil(length / STRETCHES)
    stretches = []
    for first in range(0, length, width):
        low, high = max(first, 1), min(first + width, length)  # nothing predicts the first token
        if low < high:
            part = total[low - 1 : high - 1]
            tokens_in = len(part) * len(rows)
            stretches.append(Stretch(low, high - 1, float(part.sum()) / tokens_in, tokens_in))
    return tuple(stretches)


def long_rows(documents: Iterable[np.ndarray], length: int, limit: int) -> list[np.ndarray]:
    """At most `limit` rows of exactly `length` tokens, cut from documents that have as many.

    Every position is then measured on the same rows. InputError if no document is that long.
    """
    rows: list[np.ndarray] = []
    longest = 0
    for document in documents:
        longest = max(longest, len(document))
        for start in range(0, len(document) - length + 1, length):
            rows.append(np.asarray(document[start : start + length]))
            if len(rows) == limit:
                return rows
    if not rows:
        raise InputError(
            f"no document has {length} tokens, the longest has {longest}",
            hint="give longer documents or a smaller max_length",
        )
    return rows
