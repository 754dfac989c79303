"""Where and in which precision training computes. The device is passed on, never looked up again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from llmctl.errors import MachineError
from llmctl.train.fp8 import is_capable
from llmctl.train.params import TrainParams
from llmctl.train.ranks import local_device

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Of the products that autocast knows; with fp8 the linear layers of the blocks are another matter."""


@dataclass(frozen=True)
class Compute:
    """One device, the precision of the forward pass (a key of `DTYPES`), and CPU threads (0: torch's own)."""

    device: torch.device
    precision: str = "float32"
    threads: int = 0

    @classmethod
    def of(cls, params: TrainParams) -> Compute:
        """Resolve `auto`; MachineError if a GPU, a compiler or a precision is asked for that is not there."""
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
        if params.offload_optimizer and kind == "cpu":
            raise MachineError(
                "offload_optimizer: on the CPU the state is in the host's memory already", hint="leave it off"
            )
        device = local_device(kind)
        if params.precision == "fp8" and not is_capable(device):
            raise MachineError("precision fp8: needs an NVIDIA GPU of the Hopper generation", hint="set it to bf16")
        automatic = "bf16" if kind == "cuda" else "float32"
        return cls(device, automatic if params.precision == "auto" else params.precision, params.threads)

    @property
    def bf16(self) -> bool:
        """Whether products are in bfloat16."""
        return DTYPES[self.precision] is torch.bfloat16

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision: products in the smaller type, weights and sums in float32."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32)

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
        return f"{name} {self.precision}"


class LossScale:
    """The factor that keeps gradients of fp16 above its smallest number (1710.03740, section 3.2).

    Halved when a gradient overflows, doubled after `INTERVAL` steps in a row without: powers of two, so that scaling
    changes no digit. The rules and numbers are those of `torch.amp.GradScaler`, which judges each optimizer by itself
    and so could step Muon and skip AdamW.
    """

    START = 65536.0
    INTERVAL = 2000

    def __init__(self) -> None:
        self.scale = self.START
        self.steps_without = 0

    def update(self, overflowed: bool) -> None:
        """Take note of a step."""
        if overflowed:
            self.scale, self.steps_without = self.scale / 2, 0
            return
        self.steps_without += 1
        if self.steps_without == self.INTERVAL:
            self.scale, self.steps_without = self.scale * 2, 0

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"scale": self.scale, "steps_without": self.steps_without}

    def load(self, state: dict[str, float]) -> None:
        """Take over what `state` returned."""
        self.scale, self.steps_without = state["scale"], int(state["steps_without"])
