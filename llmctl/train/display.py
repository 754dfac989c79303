"""What a training shows of itself while it runs, beside its loss: rate, norm, utilisation, memory. It never waits."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from llmctl.nn.counts import training_flops
from llmctl.nn.foreign_config import ForeignConfig
from llmctl.train.memory import resident
from llmctl.train.throughput import utilisation

if TYPE_CHECKING:
    from llmctl.train.loop import _Run

PAUSE = 0.5
"""Seconds between two looks at memory: the kernel's answer costs more than a small step should."""


class Display:
    """The fields of `Context.progress` of one training."""

    def __init__(self) -> None:
        self._next = 0.0
        self._memory = 0

    def fields(self, run: _Run) -> dict[str, float]:
        """Numbers of the last step whose readings have arrived, and of the machine."""
        known = {"loss": run.loss, "grad_norm": run.norm}
        found = {name: value for name, value in known.items() if not math.isnan(value)}
        found["lr"] = run.optimizers.rates.of["matrix"] * run.factor(run.step - 1)
        found["tokens_per_s"] = run.throughput.overall()
        if (share := used(run)) is not None:
            found["utilisation"] = share
        if memory := self._bytes(run.compute.device):
            found["memory_bytes"] = memory
        return found

    def _bytes(self, device: torch.device) -> int:
        """What torch holds of the GPU, or what the process holds of the host."""
        if device.type == "cuda":
            return torch.cuda.memory_reserved(device)
        if (now := time.monotonic()) >= self._next:
            self._next, self._memory = now + PAUSE, resident("VmRSS")
        return self._memory


def used(run: _Run) -> float | None:
    """Share of the GPUs' bf16 peak, per process; None on the CPU and on cards whose peak is not known."""
    if run.compute.device.type != "cuda":
        return None
    config: Any = run.model.config
    length = config.context
    per_token = config.training_flops(length) if isinstance(config, ForeignConfig) else training_flops(config, length)
    flops = per_token * run.throughput.overall() / run.params.parallel.world
    return utilisation(flops, torch.cuda.get_device_name(run.compute.device))
