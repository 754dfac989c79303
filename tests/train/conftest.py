"""A tiny model, random sequences, and contexts that record what they are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.stage import Context
from llmctl.text.shards import ShardWriter, SplitTokens, TokenShards
from llmctl.train.batches import Example

VOCAB = 48


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(seed: int = 0, **changes: object) -> Transformer:
        torch.manual_seed(seed)
        shape = {"arch": "llama", "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 32, "ff_dim": 48}
        return Transformer(ModelConfig(**{"vocab_size": VOCAB, **shape, **changes}))

    return make


@pytest.fixture
def make_examples() -> Callable[..., list[Example]]:
    """Random sequences of 2 to 30 tokens, each with a random mask that supervises at least the last."""

    def make(count: int, seed: int = 0, longest: int = 30) -> list[Example]:
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(count):
            length = int(rng.integers(2, longest + 1))
            mask = rng.random(length) < 0.5
            mask[-1] = True
            found.append(Example(rng.integers(0, VOCAB, length), mask))
        return found

    return make


@pytest.fixture
def make_split(tmp_path: Path) -> Callable[..., SplitTokens]:
    def make(documents: list[list[int]], vocab: int = VOCAB) -> SplitTokens:
        with ShardWriter(tmp_path / "tokens", vocab_size=vocab, tokenizer="sha256:0") as writer:
            for ids in documents:
                writer.add("train", ids, len(ids))
        return TokenShards.open(tmp_path / "tokens").split("train")

    return make


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    """A context in `tmp_path/name`; `stop_after` updates it asks to stop. `ctx.events` holds what was emitted."""

    def make(name: str = "run", stop_after: int | None = None) -> Context:
        events: list[tuple[str, dict[str, object]]] = []
        asked = iter(range(1, 1 << 30))
        stop = (lambda: next(asked) > stop_after) if stop_after is not None else (lambda: False)
        base = tmp_path / name
        emit = lambda kind, fields: events.append((kind, dict(fields)))  # noqa: E731
        context = Context("test", {"metrics": base / "metrics"}, base / "resume", emit, stop)
        context.events = events
        return context

    return make
