"""What to do with a step whose loss or gradient is not finite, or whose loss jumps."""

from __future__ import annotations

import math
import statistics
from typing import Any

from llmctl.errors import StageError
from llmctl.train.params import TrainParams

WINDOW = 64
"""Losses whose median is the measure of a spike."""
FEWEST = 8
"""With fewer no loss is called a spike: at the beginning all are far from the median."""
MOST = 10
"""Steps left out in a row after which a run has diverged."""


class Guard:
    """Judges each step by its mean loss and gradient norm before the weights are touched, and counts what it left out.

    `counts`: `skipped` and `rewound` steps and, of fp16, `overflows` of the gradient alone, which the loss scale meets.
    """

    def __init__(self, params: TrainParams, scaled: bool) -> None:
        self.on_nonfinite, self.on_spike, self.factor = params.on_nonfinite, params.on_spike, params.spike_factor
        self.scaled = scaled
        names = ["overflows"] if scaled else []
        policies = {self.on_nonfinite, *([self.on_spike] if self.factor else [])}
        names += [count for policy, count in (("skip", "skipped"), ("rewind", "rewound")) if policy in policies]
        self.counts = dict.fromkeys(names, 0)
        self.losses: list[float] = []
        self.in_a_row = 0

    @property
    def before(self) -> bool:
        """Whether a step must be judged before it is taken, so that the host has to wait for it."""
        return bool(self.counts)

    @property
    def rewinds(self) -> bool:
        """Whether a rewind can happen."""
        return "rewound" in self.counts

    def judge(self, step: int, loss: float, norm: float) -> str:
        """`take` the step counted from 0, `skip` it, `rewind`, or after an `overflow` scale the loss less.

        StageError if it is to stop.
        """
        verdict = self._verdict(loss, norm)
        if verdict == "stop":
            raise StageError(
                f"the loss is {loss:g} and the gradient norm {norm:g} at step {step + 1}",
                hint="lower lr, raise warmup_steps, or set clip",
            )
        if verdict == "take":
            self.losses = [*self.losses[1 - WINDOW :], loss] if self.factor else []
            self.in_a_row = 0
            return verdict
        self.counts[{"skip": "skipped", "rewind": "rewound", "overflow": "overflows"}[verdict]] += 1
        # The first steps of fp16 look for the scale: they are expected to overflow, some ten times at most.
        self.in_a_row += 1
        if self.in_a_row > (2 * MOST if self.scaled else MOST):
            raise StageError(
                f"{self.in_a_row} steps in a row were left out, up to step {step + 1}: the last loss is {loss:g}, the "
                f"gradient norm {norm:g}",
                hint="lower lr, raise warmup_steps or spike_factor, or set clip",
            )
        return verdict

    def _verdict(self, loss: float, norm: float) -> str:
        if math.isfinite(loss) and not math.isfinite(norm) and self.scaled:
            return "overflow"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self.on_nonfinite
        known = self.factor and len(self.losses) >= FEWEST
        return self.on_spike if known and loss > self.factor * statistics.median(self.losses) else "take"

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"counts": self.counts, "losses": self.losses, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.counts = {name: state["counts"].get(name, 0) for name in self.counts}
        self.losses, self.in_a_row = state["losses"], state["in_a_row"]
