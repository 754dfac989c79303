"""Linear layers whose three products are in 8-bit floating point, with one scale per tensor (2209.05433)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.errors import UsageError
from llmctl.nn.foreign import ForeignModel
from llmctl.nn.products import Linear

HOPPER = (9, 0)
SMALLEST = 128
"""Narrower layers lose more by casting than they gain."""
MULTIPLE = 16
"""Of which the kernels want all sizes."""


def is_capable(device: torch.device) -> bool:
    """Whether the device multiplies in 8-bit floating point: NVIDIA's Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER


def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` over its scale in `dtype`, and that scale, float32: the largest absolute value becomes the type's largest.

    Clamped before the cast: beyond the largest, e5m2 becomes infinite and e4m3 saturates on some devices only.
    """
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`a (N, K)` times the transpose of `b (M, K)`, `(N, M)` in `dtype`: rows by rows, as the kernels want them."""
    return torch._scaled_mm(a.contiguous(), b.contiguous().t(), a_scale, b_scale, out_dtype=dtype)


class _Linear(torch.autograd.Function):
    """x w': both in e4m3, of which the digits count; gradients in e5m2, of which the range does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x8, x_scale = cast(x, torch.float8_e4m3fn)
        w8, w_scale = cast(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return product(x8, x_scale, w8, w_scale, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = cast(grads[0], torch.float8_e5m2)
        for_x = product(g8, g_scale, w8.t(), w_scale, ctx.dtypes[0])
        for_weight = product(g8.t(), g_scale, x8.t(), x_scale, ctx.dtypes[1])
        return for_x, for_weight, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`x (…, K)` times the transpose of `weight (M, K)`, in `dtype` (x's): error about 4 % of a product's size.

    K, M and the number of rows have to be multiples of 16.
    """
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, dtype or x.dtype)  # type: ignore[no-untyped-call]  # torch
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias.to(out.dtype)


class Fp8Linear(Linear):
    """Multiplies in 8 bits while training; evaluation is exact, and so are rows whose number does not fit."""

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, K)` to `(…, M)`."""
        if not self.training or x.shape[:-1].numel() % MULTIPLE:
            return super().forward(x)
        on = torch.is_autocast_enabled(x.device.type)
        return linear(x, self.weight, self.bias, torch.get_autocast_dtype(x.device.type) if on else x.dtype)


@contextmanager
def fp8_blocks(model: nn.Module, wanted: bool) -> Iterator[list[str]]:
    """With `wanted`, the large linear layers in blocks multiply in 8 bits inside; yields their names."""
    chosen = dict(_large(model)) if wanted else {}
    if wanted and not chosen:
        raise UsageError(f"precision fp8: no layer of this model is {SMALLEST} wide or more", hint="set it to bf16")
    before = [type(module) for module in chosen.values()]
    for module in chosen.values():
        module.__class__ = Fp8Linear
    try:
        yield list(chosen)
    finally:
        for module, kind in zip(chosen.values(), before, strict=True):
            module.__class__ = kind


def _large(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    outer = model.outer_names if isinstance(model, ForeignModel) else None
    for name, module in model.named_modules():
        hidden = "blocks" in name.split(".") if outer is None else f"{name}.weight" not in outer
        if type(module) in (nn.Linear, Linear) and hidden:
            sizes = module.in_features, module.out_features
            if min(sizes) >= SMALLEST and not any(size % MULTIPLE for size in sizes):
                yield name, module
