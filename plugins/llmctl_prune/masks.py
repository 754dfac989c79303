"""Which single weights of a matrix go: True in a mask `(out, in)` means removed."""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl_prune.params import GROUPS


def count_removed(size: int, sparsity: float) -> int:
    """How many of `size` weights are the share `sparsity`, rounded down."""
    return int(round(size * sparsity, 6))  # 0.7 * 80 is 55.99…9 in floating point


def lowest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest scores of each row of `scores (R, C)`; among equals at the first ones."""
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def lowest_of_groups(scores: Tensor, pattern: str) -> Tensor:
    """True at the lowest scores of each aligned group of `pattern`, along the rows of `scores (R, C)`."""
    gone, size = GROUPS[pattern]
    return lowest(scores.reshape(-1, size), gone).reshape(scores.shape)


def magnitude_mask(weight: Tensor, sparsity: float, pattern: str) -> Tensor:
    """The smallest weights of the whole matrix, as magnitude pruning by layer does (Han 2015); or of each group."""
    if pattern != "unstructured":
        return lowest_of_groups(weight.abs(), pattern)
    return lowest(weight.abs().reshape(1, -1), count_removed(weight.numel(), sparsity)).reshape(weight.shape)


def wanda_mask(weight: Tensor, norms: Tensor, sparsity: float, pattern: str) -> Tensor:
    """The weights with the smallest |W| ||X||_2 of each row, or of each group (2306.11695).

    `norms (in,)`: the L2 norm of each input channel over all calibration tokens. Rows are compared with themselves
    alone, so that each output loses the same share.
    """
    scores = weight.abs().double() * norms
    if pattern != "unstructured":
        return lowest_of_groups(scores, pattern)
    return lowest(scores, count_removed(weight.shape[1], sparsity))
