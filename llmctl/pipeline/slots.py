"""What running stages share: cores, GPUs and memory of this machine. A stage starts when what it asks for is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmctl.pipeline import machine
from llmctl.spec.resolved import StageSpec


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What one running stage was given. `devices` are names for CUDA_VISIBLE_DEVICES, no two stages share one."""

    cpus: int
    memory: int
    devices: tuple[str, ...] = ()


class Slots:
    """The free part of a machine. Not for several threads: the one that starts stages asks and gives back."""

    def __init__(self, jobs: int, *, cpus: int, devices: Sequence[str] = (), memory: int = 0) -> None:
        self._jobs = jobs
        self._cpus = cpus
        self._devices = list(devices)
        self._memory = memory

    @classmethod
    def of_machine(cls, jobs: int) -> Slots:
        """All of this machine for at most `jobs` stages at once."""
        return cls(jobs, cpus=machine.cores(), devices=machine.devices(), memory=machine.memory())

    def take(self, spec: StageSpec) -> Grant | None:
        """What `spec` asks for, or None while that is not free. A stage that names no cores takes one."""
        wanted = spec.resources
        cpus, memory, gpus = wanted.cpus or 1, wanted.memory or 0, wanted.gpus or 0
        if not self._jobs or cpus > self._cpus or memory > self._memory or gpus > len(self._devices):
            return None
        grant = Grant(cpus=cpus, memory=memory, devices=tuple(self._devices[:gpus]))
        self._jobs -= 1
        self._cpus -= cpus
        self._memory -= memory
        del self._devices[:gpus]
        return grant

    def give_back(self, grant: Grant) -> None:
        """The stage has ended."""
        self._jobs += 1
        self._cpus += grant.cpus
        self._memory += grant.memory
        self._devices += grant.devices
