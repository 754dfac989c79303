"""A training rehearsed: a few steps on invented tokens in a process of its own, to measure its speed and its memory.

`python -m llmctl.train.rehearsal` reads `{"config": …, "params": …, "steps": …}` and writes what it measured, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.stage import Context
from llmctl.text.shards import SplitTokens
from llmctl.train.data import TokenSource
from llmctl.train.loop import fit
from llmctl.train.memory import resident
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams

DOCUMENT = 300
"""Tokens of an invented document."""
MARK = Path("/proc/self/clear_refs")
WARM_UP = 2
"""Steps that are not timed: memory is taken and kernels are chosen in them."""


def rehearse(config: ModelConfig, params: TrainParams, steps: int) -> dict[str, float]:
    """Train a fresh model for `steps` steps through the loop itself.

    `tokens_per_s` without the first steps; `peak_bytes` over what the process had before the model, when a tiny one had
    been trained and libraries were loaded: on the CPU resident memory, on CUDA what torch allocated.
    """
    length = min(config.context, 32)
    small = ModelConfig(arch="llama", dim=16, layers=1, heads=2, kv_heads=1, vocab_size=64, context=length)
    _train(small, params, 2)
    if mark_can_be_set():
        MARK.write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    values = _train(config, params, steps)
    peak = values.get("peak_memory_bytes", float(resident("VmHWM") - before))
    return {"tokens_per_s": values["rate"], "peak_bytes": peak, "before_bytes": float(before)}


def _train(config: ModelConfig, params: TrainParams, steps: int) -> dict[str, float]:
    clock = _Clock()
    source = TokenSource(invented(config, params, steps), config.context, params)
    given = {"max_steps": steps, "log_every": 1, "save_every": 0, "eval_every": 0}
    torch.manual_seed(params.seed)
    with tempfile.TemporaryDirectory() as folder:
        context = Context("rehearsal", {}, Path(folder), clock.event)
        values = fit(context, Transformer(config), CausalLM(), source, params.model_copy(update=given))
    return {**values, "rate": clock.rate()}


def invented(config: ModelConfig, params: TrainParams, steps: int) -> SplitTokens:
    """Random documents, enough for all steps without a second epoch."""
    documents = params.batch_size * (steps + 1) * config.context // DOCUMENT + 2
    values = np.random.default_rng(0).integers(0, config.vocab_size, documents * DOCUMENT)
    offsets = np.arange(documents + 1, dtype=np.uint64) * DOCUMENT
    return SplitTokens("train", values.astype(np.uint32), offsets, len(values))


def mark_can_be_set() -> bool:
    """Whether the kernel's note of the most memory that this process had can be set back (Linux)."""
    return MARK.exists()


class _Clock:
    """Collects the rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "metric" and fields["name"] == "tokens_per_s":
            self.rates.append(float(fields["value"]))

    def rate(self) -> float:
        """The median of the steps behind the warm-up."""
        return float(np.median(self.rates[WARM_UP:] or self.rates))


def main() -> None:
    """See the module."""
    asked = json.load(sys.stdin)
    config = ModelConfig.from_dict(asked["config"])
    params = TrainParams.model_validate(asked["params"])
    json.dump(rehearse(config, params, int(asked["steps"])), sys.stdout)


if __name__ == "__main__":
    main()
