"""What a pre-training will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmctl.forecast import Forecast, Given
from llmctl.nn.config import ModelConfig
from llmctl.nn.presets import preset
from llmctl.train.forecasting import config_of, rows_of, vocabulary_of
from llmctl.train.forecasting import forecast as training
from llmctl_train_pretrain.params import PretrainParams


def forecast(params: PretrainParams, inputs: Mapping[str, Given]) -> Forecast:
    """Full rows of the context; of masks and spans the share that is predicted."""
    config = _config(params, inputs)
    length = min(params.context or config.context, config.context)
    share = 1.0
    if config.traits.kind == "encoder":
        share = params.mask_share
    elif config.traits.kind == "encoder-decoder":
        share = params.noise_density
    plain = config.traits.kind == "decoder"
    rows = rows_of(inputs["tokens"], length)
    found = training(config, params, length, rows=rows, rehearsed=plain, load={"masked": _masked(params)})
    if share == 1:
        return found
    at_once = 1 if params.micro_batch == "auto" else params.sequences_at_once
    load = {"targets": round(share * at_once * length), "masked": _masked(params)}
    return training(config, params, length, rows=rows, load=load)


def _masked(params: PretrainParams) -> bool:
    return params.packing != "none" and params.document_mask


def _config(params: PretrainParams, inputs: Mapping[str, Given]) -> ModelConfig:
    if "model" in inputs:
        found = config_of(inputs["model"], "model")
        return replace(found, context=max(found.context, params.context or 0))
    config = preset(params.preset, vocab_size=vocabulary_of(inputs["tokenizer"]), overrides=params.shape())
    pairs = config.traits.kind == "encoder" and config.token_types > 1 and params.objective in ("auto", "mlm-nsp")
    return replace(config, head="pretraining") if pairs and not params.preset.startswith("spanbert") else config
