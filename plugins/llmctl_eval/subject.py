"""A model under test: what generates, with the tokenizer that stands beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl import Artifact
from llmctl.generator import Generator
from llmctl.registry import get_registry
from llmctl.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Subject:
    """An opened model. `role` is `model`, or `reference` for the one that it is compared with."""

    generator: Generator
    tokenizer: Tokenizer
    role: str

    @classmethod
    def open(cls, artifact: Artifact, role: str, device: str, threads: int) -> Subject:
        """Open a model of any kind."""
        generator = get_registry().open_generator(artifact, device=device, threads=threads)
        return cls(generator, Tokenizer.load(artifact.path), role)

    def answer_logprob(self, prompt: Messages, answer: str) -> float | None:
        """Log-probability, in nats, of an assistant's answer and its closing token; None if it exceeds the context."""
        asked = self.tokenizer.encode_chat(prompt, add_generation_prompt=True).ids
        whole = self.tokenizer.encode_chat([*prompt, {"role": "assistant", "content": answer}])
        if len(whole.ids) > self.generator.context_length:
            return None
        mask = np.array(whole.mask, dtype=bool)
        if whole.ids[: len(asked)] == asked:
            mask[: len(asked)] = False  # earlier turns of the assistant are part of the question
        scores = self.generator.logprobs(whole.ids).astype(np.float64)
        return float(scores[mask[1:]].sum())
