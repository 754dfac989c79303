"""What it means to generate text, free of any framework: `serve`, `eval`, `rag` and `chat` know only this.

A `Generator` deals in token ids and knows no text; `llmctl.text.streaming` turns ids into text and applies stop
strings. Both the torch model (`llmctl.train.generate`) and the ONNX engine (`llmctl.ort`) implement it; which one opens
a given artifact is decided by the hook `open_generator`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from llmctl.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The order is temperature, then top-k, then top-p, as in transformers.

    `temperature=0` is greedy. `top_k=0` and `top_p=1` switch those filters off. Equal seeds give equal tokens on one
    device and build; without a seed every call differs.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for ok, text in (
            (self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}"),
            (self.temperature >= 0, f"temperature must not be negative, got {self.temperature}"),
            (self.top_k >= 0, f"top_k must not be negative, got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}"),
        ):
            if not ok:
                raise UsageError(text)


GREEDY = Sampling()


@runtime_checkable
class Generator(Protocol):
    """One opened model. Not thread-safe: a server serialises calls or opens one per worker."""

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and answer together, that the model can attend to."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Generation ends after one of these; it is not yielded."""

    @property
    def backend(self) -> str:
        """For a human: "torch cpu float32", "onnxruntime CPUExecutionProvider"."""

    def stream(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Iterator[int]:
        """Yield new token ids one by one; ends at an EOS id, `max_new_tokens` or the context length.

        Raises UsageError if the prompt is empty or leaves no room in the context.
        """

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list[list[int]]:
        """The new ids for many prompts, in order, each equal to `list(self.stream(prompt, sampling))`."""

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """Natural log-probability of `tokens[1:]` given what stands before, shape `(len(tokens) - 1,)`, float32."""

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits at every position of one sequence, shape `(len(tokens), vocab_size)`, float32."""


def check_prompt(prompt: Sequence[int], context_length: int) -> None:
    """Refuse a prompt that cannot be answered, with the numbers a user needs."""
    if not prompt:
        raise UsageError("the prompt is empty", hint="give at least one token of text")
    if len(prompt) >= context_length:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens, the model's context is {context_length}",
            hint="shorten the prompt or use a model with a longer context",
        )
