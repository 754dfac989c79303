"""SparseGPT (2301.00774): columns are pruned from left to right, and those to their right make up for the error."""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl_prune.masks import count_removed, lowest, lowest_of_groups
from llmctl_prune.params import GROUPS


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with (H + damping mean(diag H) 1)^-1 = U^T U, for `hessian (in, in)` in float64.

    Row i of U, from its diagonal on, is what the optimal update of the columns behind i needs once those before it are
    fixed. Channels that were never active get a diagonal of 1: nothing flows to or from them.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, pattern: str, *, damping: float, column_block: int
) -> tuple[Tensor, Tensor]:
    """`weight (out, in)` with zeros and the rest updated, and the mask of what was removed.

    `hessian (in, in)`: X^T X over the calibration tokens; its scale does not matter. The mask is chosen for
    `column_block` columns at a time over all rows, by the error that removing a weight makes, w^2 / U_ii^2, of what the
    weights have become until then; of a `pattern` in groups when the first column of each is reached.
    """
    dead = hessian.diagonal() == 0
    factor = inverse_factor(hessian.double(), damping)
    left = weight.double().clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], column_block):
        stop = min(start + column_block, weight.shape[1])
        errors = _prune_block(left, mask, factor, dead, start, stop, sparsity, pattern)
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left.masked_fill(mask, 0).to(weight.dtype), mask


def _prune_block(
    left: Tensor, mask: Tensor, factor: Tensor, dead: Tensor, start: int, stop: int, sparsity: float, pattern: str
) -> Tensor:
    """Prune the columns from `start` to `stop` in place; returns the errors that the columns behind have to make up."""
    size = 0 if pattern == "unstructured" else GROUPS[pattern][1]
    if not size:
        scores = _scores(left, factor, dead, start, stop)
        count = count_removed(scores.numel(), sparsity)
        mask[:, start:stop] = lowest(scores.reshape(1, -1), count).reshape(scores.shape)
    errors = torch.zeros_like(left[:, start:stop])
    for column in range(start, stop):
        if size and column % size == 0:
            scores = _scores(left, factor, dead, column, column + size)
            mask[:, column : column + size] = lowest_of_groups(scores, pattern)
        error = left[:, column] * mask[:, column] / factor[column, column]
        left[:, column:stop] -= error[:, None] * factor[column, column:stop]
        errors[:, column - start] = error
    return errors


def _scores(left: Tensor, factor: Tensor, dead: Tensor, start: int, stop: int) -> Tensor:
    """What removing each weight costs; weights of channels that were never active go first."""
    scores = (left[:, start:stop] / factor.diagonal()[start:stop]).square()
    return scores.masked_fill(dead[start:stop], 0)
