"""Distillation of hidden states: the student's layers are to say what layers of the teacher say."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from llmctl.nn.attention import AttentionContext
from llmctl.nn.transformer import Block, Transformer
from llmctl.train.batches import Batch
from llmctl.train.cross_entropy import wide
from llmctl.train.objectives import target_states
from llmctl_distill.layers import Layers
from llmctl_distill.losses import LogitDistillation
from llmctl_distill.relations import RelationLoss

PROJECTIONS = "projections"
"""Their name in `Transformer.auxiliary`."""


def add_projections(model: Transformer, pairs: Layers, width: int, seed: int) -> None:
    """Give `model` a matrix per pair from its own width to the teacher's; none where both are equally wide.

    They are trained with the model; `drop_projections` takes them away before it is saved.
    """
    dim = model.config.dim
    if dim == width or not pairs:
        return
    random = torch.Generator().manual_seed(seed)
    found = nn.ModuleDict()
    for layer, _ in pairs:
        found[str(layer)] = made = nn.Linear(dim, width, bias=False)
        with torch.no_grad():
            made.weight.normal_(std=dim**-0.5, generator=random)
    model.auxiliary[PROJECTIONS] = found


def drop_projections(model: Transformer) -> None:
    """The model as it was before `add_projections`."""
    if PROJECTIONS in model.auxiliary:
        del model.auxiliary[PROJECTIONS]


@dataclass
class Passed:
    """What one forward pass did at a block."""

    block: Block
    entered: Tensor
    """`(B, T, D)`."""
    left: Tensor
    """`(B, T, D)`."""
    context: AttentionContext


@contextmanager
def watched(model: Transformer, layers: Collection[int]) -> Iterator[dict[int, Passed]]:
    """What the forward pass inside does at `layers`, by layer."""
    found: dict[int, Passed] = {}

    def hook(layer: int) -> Any:
        def note(block: Block, given: tuple[Tensor, AttentionContext], left: Tensor) -> None:
            found[layer] = Passed(block, given[0], left, given[1])

        return note

    handles = [model.blocks[layer].register_forward_hook(hook(layer)) for layer in sorted(set(layers))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class HiddenDistillation:
    """The loss of the logits, plus the weighted ones of the states after layers and of relations in the last."""

    logits: LogitDistillation
    pairs: Layers
    kind: str = "cosine"
    weight_of_states: float = 1.0
    relations: RelationLoss | None = None
    weight_of_relations: float = 1.0
    _watched: tuple[set[int], set[int]] = field(init=False)
    """Layers of the student and of the teacher."""

    def __post_init__(self) -> None:
        own, goals = ({pair[side] for pair in self.pairs} for side in (0, 1))
        if self.relations is not None:
            own, goals = own | {self.relations.own}, goals | {self.relations.goal}
        object.__setattr__(self, "_watched", (own, goals))

    def weight(self, batch: Batch) -> int:
        """Target tokens."""
        return len(batch.targets)

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over targets, at whose places states and relations are compared: padding and prompts count nothing.

        `hidden` is the mean over pairs of layers, `relations` of heads; both before they are weighted.
        """
        teacher = self.logits.teacher
        with watched(teacher, self._watched[1]) as goals, torch.no_grad():
            goal = target_states(teacher, batch)
        with watched(model, self._watched[0]) as seen:
            states = target_states(model, batch)
        loss, further = self.logits.compare(model, states, goal, batch.targets)
        if self.pairs:
            each = [self._distance(model, seen, goals, pair, batch.picks) for pair in self.pairs]
            distance = torch.stack(each).mean()
            further["hidden"] = distance.detach()
            loss = loss + self.weight_of_states * distance
        if self.relations is not None:
            own, aim = seen[self.relations.own], goals[self.relations.goal]
            related = self.relations.between(
                (own.block, own.entered, own.context), (aim.block, aim.entered, aim.context), batch.picks
            )
            further["relations"] = related.detach()
            loss = loss + self.weight_of_relations * related
        return loss, further

    def _distance(
        self,
        model: Transformer,
        seen: dict[int, Passed],
        goals: dict[int, Passed],
        pair: tuple[int, int],
        picks: Tensor,
    ) -> Tensor:
        """Of two layers' states at `picks`, summed over these."""
        layer, aim = pair
        own, goal = (found.left.flatten(0, 1).index_select(0, picks) for found in (seen[layer], goals[aim]))
        if PROJECTIONS in model.auxiliary:
            own = model.auxiliary[PROJECTIONS][str(layer)](own)  # type: ignore[index]  # a ModuleDict
        if self.kind == "cosine":
            return (1 - F.cosine_similarity(wide(own), wide(goal), dim=-1)).sum()
        return F.mse_loss(wide(own), wide(goal), reduction="sum") / goal.shape[-1]
