"""How long constraints take: a stopwatch around one, the same whatever engine follows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from llmctl.engine import Constraint


@dataclass
class MaskingTime:
    """Seconds that the constraints of some answers took, copies of them included; filled by `TimedConstraint`."""

    steps: list[float] = field(default_factory=list)
    """Of every mask, with what it took to follow the token before it; of those that were added only their number."""
    more: int = 0
    """Masks of other answers, whose seconds are in `rest`: a list of them all would grow with a file of prompts."""
    rest: float = 0.0
    """After the last mask of each answer: following its last token; and all of the answers that were added."""

    @property
    def seconds(self) -> float:
        """Of all together."""
        return sum(self.steps) + self.rest

    @property
    def masks(self) -> int:
        """Of all together."""
        return len(self.steps) + self.more

    def add(self, other: MaskingTime) -> None:
        """Take what other answers took to this account, in constant memory."""
        self.more += other.masks
        self.rest += other.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"masks": self.masks, "seconds": round(self.seconds, 6)}

    def line(self) -> str:
        """`masking 0.052 ms a token`; empty where there was none."""
        return f"masking {1e3 * self.seconds / self.masks:.2g} ms a token" if self.masks else ""


class TimedConstraint:
    """Implements `llmctl.engine.Constraint` with another one, and notes how long it takes."""

    def __init__(
        self, constraint: Constraint, spent: MaskingTime, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._constraint, self._spent, self._clock = constraint, spent, clock
        self._following = 0.0

    def mask(self) -> np.ndarray:
        """See `Constraint`."""
        begun = self._clock()
        found = self._constraint.mask()
        self._spent.steps.append(self._following + self._clock() - begun)
        self._spent.rest -= self._following
        self._following = 0.0
        return found

    def accept(self, token: int) -> None:
        """See `Constraint`."""
        begun = self._clock()
        self._constraint.accept(token)
        passed = self._clock() - begun
        self._following += passed
        self._spent.rest += passed

    def copy(self) -> TimedConstraint:
        """See `Constraint`; both note their time in the same place, each second once."""
        return TimedConstraint(self._constraint.copy(), self._spent, self._clock)
