"""What an answer cost: tokens and time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llmctl.text.masking import MaskingTime


@dataclass
class Spent:
    """Tokens of prompt and answer; times in seconds since the question."""

    prompt: int = 0
    new: int = 0
    first: float | None = None
    seconds: float = 0.0
    cut: bool = False
    """Whether the answer was cut at its greatest length."""
    masking: MaskingTime = field(default_factory=MaskingTime)
    """What following the form of the answer took."""
    begun: float = field(default_factory=time.perf_counter)

    def note(self, tokens: int = 1) -> None:
        """Something of the answer came."""
        self.new += tokens
        if self.first is None:
            self.first = time.perf_counter() - self.begun

    def end(self) -> None:
        """The answer is there, or was given up."""
        self.seconds = time.perf_counter() - self.begun

    def line(self) -> str:
        """`12 tokens after 340, 0.21 s to the first, 48 tokens/s`."""
        first = self.seconds if self.first is None else self.first
        rest = self.seconds - first
        speed = f", {(self.new - 1) / rest:.3g} tokens/s" if self.new > 1 and rest > 0 else ""
        line = f"{self.new} token{'' if self.new == 1 else 's'} after {self.prompt}, {first:.2f} s to the first{speed}"
        line = f"{line}, {self.masking.line()}" if self.masking.steps else line
        return f"{line}; cut off by max_new_tokens or the end of the context" if self.cut else line
