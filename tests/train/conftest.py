"""A tiny model, random sequences, and contexts that record what they are told."""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def launch_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs cases of `stage_program.py` in so many processes, as torchrun would start them; where their results lie.

    One process is this one.
    """

    def launch(cases: list[dict[str, Any]], ranks: int, out: Path | None = None) -> Path:
        out = out or tmp_path_factory.mktemp("ranks")
        if ranks == 1:
            program = runpy.run_path(str(Path(__file__).with_name("rank_program.py")))
            for case in cases:
                program["run"](case, out)
            return out
        (out / "cases.json").write_text(json.dumps(cases))
        port = str(random.SystemRandom().randrange(20000, 32000))
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(Path(__file__).with_name("stage_program.py")), str(out / "cases.json"), str(out)]
        started = [
            subprocess.Popen(
                words,
                env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            said = [process.communicate(timeout=250)[1] for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        assert [process.returncode for process in started] == [0] * ranks, "\n".join(said)
        return out

    return launch
