"""Means of the weights: what is evaluated and saved instead of the weights that are being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmctl.train.optimizers import Optimizers
from llmctl.train.parts import placed


class Averages:
    """The running mean of all weights (`decay` above 0), that of a schedule-free optimizer, or neither.

    The trained weights are kept aside and put back as they were, so that looking at the mean changes no digit of them.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, decay: float) -> None:
        self.optimizers, self.decay = optimizers, decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.parameters = trained
        self.means = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates; early ones are forgotten faster, lest the start weigh on.

        mean = d mean + (1 - d) weights, d the lesser of `decay` and (1 + step) / (10 + step).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, mean in self.means.items():
            mean.lerp_(self.parameters[name], 1 - decay)

    def current(self) -> dict[Tensor, Tensor]:
        """The mean of each parameter that has one."""
        if self.means:
            return {self.parameters[name]: mean for name, mean in self.means.items()}
        return self.optimizers.average()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the means inside, and its own weights again afterwards."""
        means = self.current()
        kept = {parameter: parameter.detach().clone() for parameter in means}
        put(means)
        try:
            yield
        finally:
            put(kept)

    def finish(self) -> None:
        """The means become the model."""
        put(self.current())

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint, by parameter."""
        return dict(self.means)

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, mean in self.means.items():
            mean.copy_(placed(state[name], mean))


@torch.no_grad()
def put(values: dict[Tensor, Tensor]) -> None:
    """Copy each value into its parameter."""
    for parameter, value in values.items():
        parameter.copy_(value)
