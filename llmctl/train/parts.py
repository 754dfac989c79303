"""Tensors of which each rank holds a part: this rank's part, the whole, and a whole put where its parts belong."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's part: of a plain tensor all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; all ranks must ask for it."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def everywhere(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` on every rank of the parted `like`, such that both can be computed with."""
    if isinstance(whole, DTensor) or not isinstance(like, DTensor):
        return whole.to(like.device)
    return DTensor.from_local(whole.to(like.device), like.device_mesh, [Replicate()] * like.device_mesh.ndim)


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every rank has, on the device of `like` and parted as it is, if that is of the same shape.

    One that is parted already stays as it is.
    """
    if isinstance(whole, DTensor):
        return whole
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole.to(like.device)
    shape, start = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
    part = whole[tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))].to(like.device)
    return DTensor.from_local(
        part.contiguous(), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
