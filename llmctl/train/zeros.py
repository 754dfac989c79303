"""Weights that are 0 and stay 0: the mask of a pruned model, which every optimizer step would fill otherwise."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.errors import UsageError
from llmctl.nn.foreign import ForeignModel
from llmctl.train.optimizers import is_hidden_matrix
from llmctl.train.parts import local


class Zeros:
    """The zeros of a model's hidden matrices as they are now: embedding, head, norms and biases train freely.

    Made before a checkpoint is read, so that a resumed run has the mask of the model that it started from. Each rank
    keeps those of its part of the weights.
    """

    def __init__(self, model: nn.Module, keep: bool) -> None:
        parameters = hidden_matrices(model).values() if keep else ()
        self.masks = [(parameter, local(parameter.detach()) == 0) for parameter in parameters]

    @torch.no_grad()
    def keep(self) -> None:
        """Set to 0 what was 0."""
        for parameter, mask in self.masks:
            local(parameter.detach()).masked_fill_(mask, 0)


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained matrices that map hidden states to hidden states, by name."""
    outer = model.outer_names if isinstance(model, ForeignModel) else frozenset()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in outer and is_hidden_matrix(name, parameter)
    }


def require_zeros(model: nn.Module) -> None:
    """UsageError unless some hidden matrix has a 0: without one there is nothing to keep."""
    if not any(bool((parameter == 0).any()) for parameter in hidden_matrices(model).values()):
        raise UsageError(
            "keep_zeros: no weight of the model's hidden matrices is 0",
            hint="leave it out, or give a model that `prune` made sparse",
        )
