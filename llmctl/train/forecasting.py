"""Forecasts of trainings: from parameters and what is known of the inputs to a `Forecast`. Free of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llmctl.console import human_number
from llmctl.errors import LlmctlError
from llmctl.forecast import Forecast, Given, Unknown
from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import count, training_flops
from llmctl.nn.families import from_hf
from llmctl.pipeline.machine import devices
from llmctl.train.footprint import ADVICE, Load, footprint
from llmctl.train.parallel import bubble_share
from llmctl.train.params import TrainParams


def forecast(
    config: ModelConfig,
    params: TrainParams,
    length: int,
    *,
    rows: int | None,
    rehearsed: bool = False,
    upper_bound: bool = False,
    load: Mapping[str, Any] | None = None,
) -> Forecast:
    """The forecast of training `config` on rows of `length` tokens, `rows` per epoch (None: not known).

    `load`: what differs from `Load.of`.
    """
    cuda = params.device == "cuda" or (params.device == "auto" and bool(devices()))
    parts = footprint(config, params, Load.of(params, length, cuda=cuda, **(load or {})))
    steps = params.max_steps
    if steps is None and rows:
        steps = max(1, math.ceil(params.epochs * rows / params.batch_size))
    return Forecast(
        model=f"{config.arch}, {config.layers} layers × {config.dim}, vocabulary {human_number(config.vocab_size)}",
        parameters=count(config).total,
        operations_per_token=training_flops(config, length),
        memory=parts.parts,
        moment=parts.moment,
        advice=ADVICE,
        tokens_per_step=params.batch_size * length,
        steps=steps,
        cuda=cuda,
        processes=params.parallel.world,
        config=config,
        rehearsal={"config": config.to_dict(), "params": _shared(params)} if rehearsed else {},
        upper_bound=upper_bound,
        note="; ".join(_notes(params, upper_bound)),
    )


def _notes(params: TrainParams, upper_bound: bool) -> Iterator[str]:
    if upper_bound:
        yield "as if every conversation filled the context: an upper bound"
    ranks, parts = params.parallel, params.micro_batches
    if ranks.pp > 1:
        share = bubble_share(ranks.pp, parts, ranks.virtual_stages)
        yield f"{ranks.pp_schedule} with {parts} micro-batches: bubble {share:.1%} of the time that is computed"


def _shared(params: TrainParams) -> dict[str, Any]:
    """The parameters that every training has, of one process."""
    values = params.model_dump(mode="json")
    return {name: values[name] for name in TrainParams.model_fields if name != "parallel"}


def config_of(given: Given, port: str) -> ModelConfig:
    """The configuration of the model at a port; Unknown if it is neither there nor foretold."""
    if given.artifacts:
        try:
            return from_hf(json.loads((given.artifacts[0] / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, LlmctlError) as error:
            raise Unknown(f"its {port} is of a family whose size is not foretold") from error
    if given.forecast is not None and isinstance(given.forecast.config, ModelConfig):
        return given.forecast.config
    raise Unknown(f"its {port} is not there yet")


def vocabulary_of(given: Given) -> int:
    """Tokens of the vocabulary at a port with a tokenizer; Unknown before it is made without a stated size."""
    for artifact in given.artifacts:
        if isinstance(size := artifact.metadata.get("vocab_size"), int):
            return size
    if isinstance(size := getattr(given.params, "vocab_size", None), int):
        return size
    raise Unknown("its vocabulary is not known yet")


def rows_of(given: Given, length: int) -> int | None:
    """Rows of `length` tokens in the `train` splits of token shards; None if they are not there yet."""
    if not given.artifacts:
        return None
    total = 0
    for artifact in given.artifacts:
        try:
            meta = json.loads((artifact / "meta.json").read_text(encoding="utf-8"))
            total += int(meta["splits"]["train"]["tokens"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return max(1, total // length)


def answers(
    params: TrainParams,
    inputs: Mapping[str, Given],
    port: str = "model",
    per_row: int = 1,
    further: Mapping[str, Any] | None = None,
) -> Forecast:
    """Of a training on conversations (`per_row` sequences each): as if every one filled the model's context.

    `further`: what else differs from `Load.of`.
    """
    config = config_of(inputs[port], port)
    if config.traits.kind == "encoder-decoder":
        raise Unknown("labelled rows have no length of their own")
    length = config.context
    at_once = 1 if params.micro_batch == "auto" else params.sequences_at_once
    rows = per_row * at_once
    load = {"rows": rows, "targets": rows * length, "masked": params.packing != "none", **(further or {})}
    found = forecast(config, params, length, rows=None, upper_bound=True, load=load)
    return replace(found, tokens_per_step=per_row * found.tokens_per_step)
