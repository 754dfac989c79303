"""Which of torch's attention kernels computes: seen in what torch runs, not guessed from what it was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmctl.train.params import TrainParams

KERNELS = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_fused_attention_overrideable": "fused",
    "aten::_scaled_dot_product_attention_math": "math",
}
"""What torch's `scaled_dot_product_attention` chooses from, by the names of `torch.nn.attention.SDPBackend`."""
WHOLE = "math"
"""The one that holds all scores, so that its memory grows with the square of the length."""
RECORDER = ("_enable_profiler_legacy", "_disable_profiler_legacy", "_profiler_enabled")
"""What torch keeps in `torch.autograd` without promising it: a torch that has it no longer trains all the same."""
OTHER = "plain"
"""Attention that calls none of them: soft-capped scores, which are products of whole matrices."""


def kernels_of(operators: Iterable[str]) -> tuple[str, ...]:
    """The kernels among operators that ran, each once, by name; `OTHER` where attention called none."""
    found = {KERNELS[name] for name in operators if name in KERNELS}
    return tuple(sorted(found)) or (OTHER,)


@contextmanager
def operators_listed() -> Iterator[list[str]]:
    """The names of all operators that torch ran inside, once the block has ended.

    By the recorder below torch's old profiler: torch.profiler writes to stderr and takes a second to begin, and the
    profiler itself fails on the ends of collectives that began before it.
    """
    from torch.autograd.profiler_legacy import profile

    found: list[str] = []
    recorder: Any = profile()  # type: ignore[no-untyped-call]  # torch
    torch.autograd._enable_profiler_legacy(recorder.config())  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        for thread in torch.autograd._disable_profiler_legacy():  # type: ignore[attr-defined]
            found += [record.name() for record in thread]


class KernelWatch:
    """Looks at one forward pass: the first, or of a compiled model, which compiles in that one, the second."""

    def __init__(self, params: TrainParams) -> None:
        self.kernels: tuple[str, ...] = ("flex",) if params.attention == "flex" else ()
        """Those seen; empty before the pass that is looked at, and where torch cannot be watched.

        `flex` has one kernel, so nothing is looked at.
        """
        self._left = 1 if params.compile else 0
        self._told = False
        self._blind = not all(hasattr(torch.autograd, name) for name in RECORDER)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around each forward pass. Costs nothing after the one that is looked at."""
        if self._blind or self.kernels or self._left > 0 or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            self._left -= 1
            yield
            return
        with operators_listed() as found:
            yield
        self.kernels = kernels_of(found)

    def news(self) -> bool:
        """Whether `kernels` are known; True once."""
        known, self._told = bool(self.kernels) and not self._told, self._told or bool(self.kernels)
        return known

    def describe(self) -> str:
        """One line for a person."""
        text = "attention kernel: " + " and ".join(self.kernels)
        held = {WHOLE, OTHER} & set(self.kernels)
        return f"{text}, which holds all scores: memory grows with the square of the length" if held else text
