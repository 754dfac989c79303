"""What the scheduler knows about a request: its answers, its beams, how far its prompt is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmctl.beams import BeamSearch
from llmctl.engine import Request, TokenScores


@dataclass(eq=False)
class Lane:
    """One sequence in a slot: an answer, or a beam."""

    task: Task
    choice: int
    state: Any
    """Of `llmctl.ort.sampling`."""
    slot: int = -1
    token: int | None = None
    """Chosen, and to be fed by the next step; None while the lane does not run."""
    said: int = 0
    """Tokens of the answer so far."""
    answer: list[int] = field(default_factory=list)
    """These tokens, `token` the last of them; kept where tokens are proposed, empty elsewhere."""
    shares: bool = False
    """A beam's slot holds the prompt already."""
    done: bool = False


@dataclass(eq=False)
class Task:
    """A request that was submitted and has not ended."""

    ticket: int
    request: Request
    prompt: np.ndarray
    """`(T,)` int32."""
    limit: int
    """Most tokens of an answer."""
    lanes: list[Lane] = field(default_factory=list)
    search: BeamSearch | None = None
    beams: list[Lane] = field(default_factory=list)
    """The running lanes, in the order of the search's beams."""
    reading: Lane | None = None
    """The lane whose slot the prompt is read into."""
    logits: np.ndarray | None = None
    """`(1, V)` after the prompt, for answers that have not begun."""
    fed: int = 0
    """Tokens of the prompt whose keys and values its slot holds."""
    cached: int = 0
    """Those that were there already."""
    prompt_scores: list[TokenScores | None] = field(default_factory=list)
    waits: bool = False
    """For slots."""
    told: bool = False
    """There was an event."""
    cancelled: set[int] = field(default_factory=set)
    adapter: int = 0
    """The number of the request's adapter; 0: the model as it is."""

    @property
    def ended(self) -> bool:
        """Whether every lane has."""
        return all(lane.done for lane in self.lanes)

    @property
    def pending(self) -> list[Lane]:
        """Draws that have no slot yet."""
        return [lane for lane in self.lanes if not lane.done and lane.slot < 0]

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.prompt) - self.fed

    @property
    def scores_prompt(self) -> bool:
        """Whether the tokens of the prompt are still to be scored, so that all of it must be computed."""
        return self.request.prompt_logprobs is not None and not self.told
