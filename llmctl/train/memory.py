"""How many sequences fit at once: tried before the first step, so that memory runs out in the first minute or never."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llmctl.console import human_bytes
from llmctl.errors import MachineError
from llmctl.pipeline.machine import memory

HINT = "set micro_batch to auto or lower it, recompute to full, loss_chunk to 4096, or shorten the context"


def largest_fitting(first: int, attempt: Callable[[int], None], clean_up: Callable[[], None]) -> int:
    """`first`, or the first of its halves for which `attempt` does not raise torch.OutOfMemoryError.

    `clean_up` runs after each failure, when what the attempt held is free. MachineError if not even 1 fits.
    """
    count = first
    while not _fits(count, attempt):
        clean_up()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if count == 1:
            raise MachineError("not even one sequence at a time fits the memory", hint=HINT)
        count = (count + 1) // 2
    return count


def _fits(count: int, attempt: Callable[[int], None]) -> bool:
    # The exception holds the frames, and they the tensors, until it is left.
    try:
        attempt(count)
    except torch.OutOfMemoryError:
        return False
    return True


def require(needed: int) -> None:
    """torch.OutOfMemoryError unless the host has `needed` bytes: Linux gives out more than there is, then kills."""
    if needed > available():
        raise torch.OutOfMemoryError(f"{human_bytes(needed)} needed, {human_bytes(available())} available")


def available() -> int:
    """Bytes that this process can still take from the host, its control group's limit observed."""
    found = {"MemAvailable": 0, "VmRSS": 0}
    for path in ("/proc/meminfo", "/proc/self/status"):
        text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
        found |= {name: int(number) << 10 for name, number in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    limit = memory() - found["VmRSS"]
    return min(found["MemAvailable"] or limit, limit)


def resident(name: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the most so far) of this process; 0 where the system does not say."""
    path = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(encoding="utf-8") if path.exists() else "", re.M)
    return int(found[1]) << 10 if found else 0


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of all tensors that `forward` keeps for the gradient, the model's own left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors, so that no storage is freed and its address used again

    def note(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
