"""Where and in which precision training computes. The device is passed on, never looked up again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from llmctl.errors import MachineError
from llmctl.train.params import TrainParams


@dataclass(frozen=True)
class Compute:
    """One device, the precision of the forward pass, and the number of CPU threads (0: torch's own)."""

    device: torch.device
    bf16: bool = False
    threads: int = 0

    @classmethod
    def of(cls, params: TrainParams) -> Compute:
        """Resolve `auto`; MachineError if a GPU or a compiler is asked for that is not there."""
        has_cuda = torch.cuda.is_available()
        if params.device == "cuda" and not has_cuda:
            raise MachineError("device cuda: torch sees no NVIDIA GPU", hint="set device to cpu or auto")
        kind = params.device if params.device != "auto" else ("cuda" if has_cuda else "cpu")
        if params.compile and kind == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            raise MachineError("compile: no C++ compiler found", hint="install g++ or leave compile off")
        if params.attention == "flex" and kind == "cpu":
            raise MachineError(
                "attention flex: torch computes its gradients on CUDA only", hint="set attention to sdpa"
            )
        bf16 = params.precision == "bf16" or (params.precision == "auto" and kind == "cuda")
        return cls(torch.device(kind), bf16, params.threads)

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision: products in bfloat16, weights and sums in float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def limit_threads(self) -> Iterator[None]:
        """Use `threads` CPU threads inside, the former number afterwards."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return f"{name} {'bf16' if self.bf16 else 'float32'}"
