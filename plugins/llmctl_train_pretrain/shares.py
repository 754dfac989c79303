"""What `llmctl models NAME --parallel …` adds: what each of many processes would hold of the model in training."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from llmctl.errors import UsageError
from llmctl.nn.config import ModelConfig
from llmctl.train.parallel import ParallelParams

NAMES = ("dp_replicate", "dp_shard", "tp", "cp", "pp")
PER_WEIGHT = 4 * 4
"""Bytes in training: weight, gradient and AdamW's two moments in float32."""


def parallel_of(text: str) -> ParallelParams:
    """`dp_shard=16,tp=4` as parameters; UsageError for another form, an unknown name or sizes that do not fit."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in NAMES or not size.isdecimal():
            hint = f"as in dp_shard=16,tp=4; the names are {', '.join(NAMES)}"
            raise UsageError(f"--parallel: {part.strip()!r} is no NAME=SIZE", hint=hint)
        values[name] = int(size)
    try:
        return ParallelParams.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        raise UsageError(f"--parallel {text}: {found['msg']}", hint="sizes are 1 or more") from None


def shares(config: ModelConfig, parallel: ParallelParams) -> dict[str, Any]:
    """The model spread over processes that are not there: how many weights one has at most, and bytes."""
    from llmctl.train.fake_ranks import held

    firsts = range(0, parallel.world, parallel.world // parallel.pp)
    found = max((held(config, parallel, rank) for rank in firsts), key=lambda held: held.own)
    return {
        "processes": parallel.world,
        "parallel": {name: getattr(parallel, name) for name in NAMES},
        "parameters_per_process": found.own,
        "training_bytes_per_process": found.own * PER_WEIGHT,
    }
