"""Numbers of a step on their way from the device: copied without waiting, read when they have arrived.

A number that is read at once makes the host wait for the device, and then the device for the host, in every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Reading:
    """Sums over one step, by name, and what they are divided by."""

    step: int
    """Counted from 0."""
    weight: int
    sums: dict[str, Tensor]
    """0-dimensional, on the device."""
    values: Tensor = field(init=False)
    arrival: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        stacked = torch.stack([value.detach().double() for value in self.sums.values()])
        if stacked.device.type == "cuda":
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self.values = host.copy_(stacked, non_blocking=True)
            self.arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
            self.arrival.record()
        else:
            self.values = stacked

    @property
    def at_hand(self) -> bool:
        """Whether the numbers never were anywhere else."""
        return self.arrival is None

    @property
    def arrived(self) -> bool:
        """Whether reading would not wait."""
        return self.arrival is None or bool(self.arrival.query())  # type: ignore[no-untyped-call]  # torch

    def read(self) -> dict[str, float]:
        """The sums as numbers; waits for them."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return dict(zip(self.sums, self.values.tolist(), strict=True))


class Readings:
    """Steps whose numbers have not been looked at, oldest first; `take` gets each read one."""

    def __init__(self, take: Callable[[Reading, dict[str, float]], None]) -> None:
        self.take = take
        self.waiting: deque[Reading] = deque()

    def add(self, reading: Reading) -> None:
        """Put `reading` behind the others, and look at those that have arrived."""
        self.waiting.append(reading)
        self.look()

    def look(self, wait: bool = False) -> None:
        """Look at those that have arrived; with `wait`, at all."""
        while self.waiting and (wait or self.waiting[0].arrived):
            reading = self.waiting.popleft()
            self.take(reading, reading.read())
