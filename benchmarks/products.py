"""A linear layer and its gradient in float32 on the CPU: `llmctl.nn.products` beside torch's own, in turns.

    python benchmarks/products.py [--threads 2] [--rounds 40]

Prints per shape the median GFLOP/s of both sides and the median of the ratios of the rounds. Where torch's own library
is taken for the product (`ONEDNN_IS_FASTER` is false) both sides are the same, unless `--force` is given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from llmctl.nn import products

SHAPES = [(2048, 128, 352), (2048, 352, 128), (2048, 128, 1024), (1024, 768, 2048), (1024, 2048, 768)]
"""Rows, in, out."""


def seconds(function: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> float:
    """One forward pass and both products of the gradient."""
    start = time.perf_counter()
    torch.autograd.grad(function(x, weight), (x, weight), grad)
    return time.perf_counter() - start


def main() -> None:
    """Take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--force", action="store_true", help="take oneDNN whatever the processor")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    products.ONEDNN_IS_FASTER |= options.force
    print(f"oneDNN is taken: {products.ONEDNN_IS_FASTER}")
    for rows, inner, outer in SHAPES:
        x, weight = torch.randn(rows, inner, requires_grad=True), torch.randn(outer, inner, requires_grad=True)
        grad = torch.randn(rows, outer)
        taken: list[tuple[float, float]] = []
        for _ in range(options.rounds + 5):
            taken.append((seconds(products.linear, x, weight, grad), seconds(F.linear, x, weight, grad)))
        ours, torchs = (
            6 * rows * inner * outer / statistics.median(side) / 1e9 for side in zip(*taken[5:], strict=True)
        )
        ratio = statistics.median(b / a for a, b in taken[5:])
        print(f"{rows} x {inner} -> {outer}: {ours:5.0f} GFLOP/s, torch's own {torchs:5.0f}; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
