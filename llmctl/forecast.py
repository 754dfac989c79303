"""What a training will take before it is begun: sizes, operations, memory. A stage's `forecast` makes one.

Free of everything heavy: `llmctl plan` asks every stage that would run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmctl.stage import Artifact

STATE = ("weights", "optimizer", "mean", "teacher")
"""Parts of the memory that are there from the first step to the last."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One training. Bytes are those of one process at its worst moment, by part, the largest process of all."""

    model: str
    """In words: `llama, 4 layers × 192`."""
    parameters: int
    operations_per_token: int
    """Of forward and backward pass."""
    memory: Mapping[str, int]
    moment: str
    """When all of `memory` is there at once."""
    advice: Mapping[str, str]
    """What to change where a part is too large."""
    tokens_per_step: int = 0
    steps: int | None = None
    """None: it depends on data that is not there yet."""
    cuda: bool = False
    processes: int = 1
    config: Any = None
    """The model's configuration, for the forecasts of stages that go on with it."""
    rehearsal: Mapping[str, Any] = field(default_factory=dict)
    """What `llmctl.train.rehearsal` needs to measure this training; empty where it cannot."""
    note: str = ""
    upper_bound: bool = False
    """Sequences may well be shorter: only what does not depend on them is sure to be needed."""

    @property
    def tokens(self) -> int | None:
        """Tokens of all steps."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    @property
    def operations(self) -> int | None:
        """Operations of all steps."""
        return None if self.tokens is None else self.tokens * self.operations_per_token

    @property
    def bytes(self) -> int:
        """Memory of one process."""
        return sum(self.memory.values())

    @property
    def least(self) -> int:
        """What of it is needed whatever the data."""
        return sum(self.memory.get(name, 0) for name in STATE) if self.upper_bound else self.bytes

    @property
    def largest(self) -> str:
        """The part of the memory that takes most."""
        return max(self.memory, key=lambda name: self.memory[name])


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of an input port before the run: artifacts that are there, or the stage that will make them."""

    artifacts: Sequence[Artifact] = ()
    params: Any = None
    """Parameters of the stage that will make it."""
    forecast: Forecast | None = None
    """Of that stage, if it trains."""


class Unknown(Exception):
    """There is no forecast yet, and why."""
