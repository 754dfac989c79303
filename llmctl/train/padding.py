"""Batches of equal shape: needed so where activations are sent, or sequences cut into equal parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.nn.attention import PADDING
from llmctl.train.batches import Batch

FILLING = {"tokens": 0, "positions": 0, "documents": PADDING, "segments": 0, "prefix": 0, "candidates": 0}
"""Fields of the shape `(B, T)`, and what stands where nothing does."""


def padded(batch: Batch, rows: int, width: int, causal: bool = True) -> Batch:
    """The same batch as `rows` times `width` tokens: filled up on the right and below, its targets where they were.

    With `causal` no token sees what is filled in behind it, so that rows of one sequence each stay without documents.
    """
    if tuple(batch.tokens.shape) == (rows, width):
        return batch
    given = batch.tokens.shape[1]
    found: dict[str, Any] = {}
    if batch.documents is None and not causal:
        found["documents"] = _filled(torch.zeros_like(batch.tokens), rows, width, PADDING)
    for name, filling in FILLING.items():
        value = getattr(batch, name)
        if value is not None:
            found[name] = _filled(value, rows, width, filling)
    for name in ("picks", "firsts"):
        value = getattr(batch, name)
        if value is not None:
            found[name] = _moved(value, given, width)
    if batch.boundaries is not None:
        edges = _moved(batch.boundaries[:, :2], given, width)
        found["boundaries"] = torch.cat([edges, batch.boundaries[:, 2:]], dim=1)
    return replace(batch, **found)


def alike(batches: list[Batch], causal: bool = True) -> list[Batch]:
    """The batches, all padded to the shape of the largest."""
    rows, width = (max(batch.tokens.shape[axis] for batch in batches) for axis in (0, 1))
    return [padded(batch, rows, width, causal) for batch in batches]


def _filled(value: Tensor, rows: int, width: int, filling: int) -> Tensor:
    return F.pad(value, (0, width - value.shape[1], 0, rows - value.shape[0]), value=filling)


def _moved(places: Tensor, given: int, width: int) -> Tensor:
    """Flat indices into rows of `given` tokens as those into rows of `width`."""
    return places + torch.div(places, given, rounding_mode="floor") * (width - given)
