"""A model under test: what generates or reads, with the tokenizer that stands beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llmctl import Artifact, InputError
from llmctl.generation_config import read_generation_config, rules_of
from llmctl.generator import Generator
from llmctl.reader import Reader
from llmctl.registry import get_registry
from llmctl.rules import Rules
from llmctl.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A model, opened when it is first asked. `role` is `model`, or `reference` for the one it is compared with."""

    artifact: Artifact
    tokenizer: Tokenizer
    role: str
    device: str
    threads: int

    @classmethod
    def of(cls, artifact: Artifact, role: str, device: str, threads: int) -> Subject:
        """A model of any kind."""
        return cls(artifact, Tokenizer.load(artifact.path), role, device, threads)

    @cached_property
    def generator(self) -> Generator:
        """The model, to generate with."""
        return get_registry().open_generator(self.artifact, device=self.device, threads=self.threads)

    @cached_property
    def rules(self) -> Rules | None:
        """What its answers keep to, by its own `generation_config.json`."""
        return rules_of(read_generation_config(self.artifact.path))

    @cached_property
    def reader(self) -> Reader:
        """The model, to read with."""
        return open_reader(self.artifact, self.device, self.threads)

    @property
    def backend(self) -> str:
        """What computes the opened model."""
        opened = self.__dict__.get("reader") or self.generator
        return str(opened.backend)

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


def open_reader(artifact: Artifact, device: str, threads: int) -> Reader:
    """What reads with a model: the one place where its kind matters. InputError for a kind that only generates."""
    if artifact.type == "model.hf":
        from llmctl.train import reading

        return reading.open_reader(artifact.path, device, threads)
    if artifact.type == "model.onnx":
        from llmctl.ort import open_encoder

        return open_encoder(artifact.path, device, threads)
    raise InputError(
        f"{artifact.path} is a {artifact.type}, which cannot read texts", hint="give a model.hf or a model.onnx"
    )
