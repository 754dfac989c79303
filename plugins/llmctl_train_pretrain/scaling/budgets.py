"""How many operations a budget buys: given outright, or as hours of machines whose speed is known or assumed."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.errors import InputError, UsageError
from llmctl.store import Store
from llmctl.store.names import read_json
from llmctl.train.throughput import PEAKS

MFU = 0.4
"""Share of a card's peak that is assumed where nothing was measured."""


@dataclass(frozen=True)
class Budget:
    """Operations, and in words where they come from."""

    flops: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What is known about the machines: one of these, the rest None."""

    flops_per_second: float | None = None
    gpu: str | None = None
    mfu: float | None = None
    tokens_per_second: float | None = None
    of_parameters: float | None = None
    measured: str | None = None

    def per_second(self, store: Store) -> tuple[float, str]:
        """(operations per second of one device, in words); UsageError unless exactly one way is given, whole."""
        ways = [self.flops_per_second, self.gpu, self.tokens_per_second, self.measured]
        if sum(way is not None for way in ways) != 1:
            raise UsageError(
                "--hours needs to know how fast the machines are",
                hint="one of --flops-per-second, --gpu, --tokens-per-second with --of-parameters, --measured",
            )
        if (self.tokens_per_second is None) != (self.of_parameters is None):
            raise UsageError("--tokens-per-second and --of-parameters go together: speed depends on the size")
        if self.mfu is not None and self.gpu is None:
            raise UsageError("--mfu is a share of a card's peak", hint=f"--gpu {', '.join(PEAKS)}")
        if self.flops_per_second is not None:
            return self.flops_per_second, f"{self.flops_per_second:.3g} operations per second"
        if self.gpu is not None:
            share = MFU if self.mfu is None else self.mfu
            peak = PEAKS[self.gpu]
            return share * peak, f"{share:.0%} of the {peak:.3g} bf16 operations per second of one {self.gpu}" + (
                "" if self.mfu is not None else " (assumed)"
            )
        if self.tokens_per_second is not None and self.of_parameters is not None:
            found = 6 * self.of_parameters * self.tokens_per_second
            size = f"{self.tokens_per_second:.4g} tokens per second with {self.of_parameters:.3g} parameters"
            return found, f"{size}: {found:.3g} operations per second"
        return self._of_a_run(store)

    def _of_a_run(self, store: Store) -> tuple[float, str]:
        metrics = read_json(store.resolve(str(self.measured), ("metrics",)) / "metrics.json")
        n, rate = metrics.get("parameters"), metrics.get("tokens_per_s")
        if not isinstance(n, int | float) or not isinstance(rate, int | float):
            raise InputError(
                f"{self.measured} reports no `parameters` and `tokens_per_s`", hint="a finished training has both"
            )
        return 6 * n * rate, f"{rate:.4g} tokens per second with {n:.3g} parameters, measured by {self.measured}"


def in_hours(hours: float, devices: int, speed: Speed, store: Store) -> Budget:
    """The operations of so many hours of so many devices."""
    rate, text = speed.per_second(store)
    return Budget(rate * devices * hours * 3600, f"{hours:g} hours of {devices} × {text}")
