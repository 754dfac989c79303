"""Linear layers in float32 on CPU, by the library that multiplies fastest there.

torch multiplies float32 matrices on x86 by MKL, which takes its AVX2 kernels on AMD processors even where they have
AVX-512. oneDNN, which torch brings for other dtypes, takes what there is: on two Zen 5 cores a layer and its gradients
take 1.5 to 2.1 times less (`benchmarks/products.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

SMALLEST = 1 << 20
"""Multiplications below which a call of oneDNN costs more than it saves."""
FEWEST_ROWS = 4
"""Below, a product reads every weight once for little work, which any library does at the speed of the memory."""


def _vendor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:  # another system than Linux
        return ""


ONEDNN_IS_FASTER = (
    torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # torch
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and _vendor() == "AuthenticAMD"
)
"""Whether this is an AMD processor with AVX-512 under a torch that has both libraries."""


class Linear(nn.Linear):
    """`nn.Linear` whose product may be oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        """`input (…, in_features)` to `(…, out_features)`."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of `x (…, I)` and `weight (O, I)`, `(…, O)`; equal up to rounding."""
    if not _fits(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]  # torch
    return _product(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        ONEDNN_IS_FASTER
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and x.numel() * weight.shape[0] >= SMALLEST
        and x.numel() >= FEWEST_ROWS * weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    run = _opaque if torch.compiler.is_compiling() else _onednn
    return run(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@torch.library.custom_op("llmctl::linear", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_onednn` as one step of a compiled graph: torch.compile takes its operator for weights that never change."""
    return _onednn(x, weight, bias)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


OPERATORS = (
    torch.ops.llmctl.linear.default,
    *([torch.ops.mkldnn._linear_pointwise.default] if hasattr(torch.ops.mkldnn, "_linear_pointwise") else []),
)
"""What such a product is called in a graph and by a dispatch mode."""


class _Linear(torch.autograd.Function):
    """dx = g W, dW = g^T x, db = sum(g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        again = torch.is_grad_enabled()  # a second derivative is going to be taken of what is returned
        product = F.linear if again else _product
        return (
            product(grad, weight.t(), None) if wants_x else None,
            product(rows.t(), x.flatten(0, -2).t(), None) if wants_weight else None,
            rows.sum(0) if ctx.biased and wants_bias else None,
        )
