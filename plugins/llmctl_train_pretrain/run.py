"""Pre-train a language model on token shards."""

from __future__ import annotations

import torch

from llmctl.errors import InputError, UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import count
from llmctl.nn.hf import load_model
from llmctl.nn.presets import preset
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.data import TokenSource
from llmctl.train.device import Compute
from llmctl.train.loop import fit
from llmctl.train.models import write_model
from llmctl.train.objectives import CausalLM
from llmctl.train.validation import Validate, language_loss
from llmctl_train_pretrain.params import PretrainParams


def run(
    ctx: Context, params: PretrainParams, tokens: Artifact, tokenizer: Artifact, model: Artifact | None = None
) -> None:
    """Train a fresh model, or go on with `model`, on the split `train`; measure on `validation` where there is one."""
    shards, encoder = TokenShards.open(tokens), Tokenizer.load(tokenizer.path)
    check_tokenizer(shards, encoder)
    net = make_model(params, encoder) if model is None else continue_model(params, encoder, model)
    context = params.context or net.config.context
    source = TokenSource(shards.split("train"), context, params)
    ctx.log(
        f"{net.config.arch}, {net.config.parameters()} parameters; {len(source.split.tokens)} tokens in "
        f"{len(source.split)} documents, {source.steps_per_epoch:.1f} steps per epoch"
    )
    values = fit(ctx, net, CausalLM(), source, params, validator(shards, encoder, context, params))
    epochs = values["steps"] / source.steps_per_epoch
    write_model(ctx, net, tokenizer.path, {**values, **sizes(net.config), "epochs": epochs})


def sizes(config: ModelConfig) -> dict[str, int]:
    """What scaling laws count beside all parameters: those of the blocks, and with them those of the output head."""
    blocks = count(config).without_embedding
    return {"parameters.without_embedding": blocks, "parameters.with_head": blocks + config.vocab_size * config.dim}


def check_tokenizer(shards: TokenShards, tokenizer: Tokenizer) -> None:
    """InputError unless the shards were made with this tokenizer."""
    if shards.tokenizer != tokenizer.digest:
        raise InputError(
            f"{shards.directory} was made with the tokenizer {shards.tokenizer[:19]}…, not {tokenizer.digest[:19]}…",
            hint="take tokens and tokenizer from the same `tokenize` stage",
        )
    if shards.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{shards.directory} has a vocabulary of {shards.vocab_size}, the tokenizer one of {tokenizer.vocab_size}",
            hint="make the tokens again",
        )


def make_model(params: PretrainParams, tokenizer: Tokenizer) -> Transformer:
    """Fresh weights, a function of the seed."""
    special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    config = preset(params.preset, vocab_size=tokenizer.vocab_size, overrides={**params.shape(), **special})
    torch.manual_seed(params.seed)
    return Transformer(config)


def continue_model(params: PretrainParams, tokenizer: Tokenizer, artifact: Artifact) -> Transformer:
    """The weights of `artifact`; its shape cannot be changed, a shorter `context` only shortens the rows."""
    model = load_model(artifact.path)
    for name, value in params.shape().items():
        has = getattr(model.config, name)
        if value != has and not (name == "context" and value < has):
            raise UsageError(f"{name} is {value}, the model to continue has {has}", hint=f"leave {name} out")
    if model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{artifact.path} has a vocabulary of {model.config.vocab_size}, the tokens one of {tokenizer.vocab_size}",
            hint="use the tokenizer that the model was trained with",
        )
    return model


def validator(shards: TokenShards, tokenizer: Tokenizer, context: int, params: PretrainParams) -> Validate | None:
    """Loss per token and bits per byte on evenly spread rows of `validation`; None without that split."""
    if "validation" not in shards.splits or not len(shards.split("validation").tokens):
        return None
    source = TokenSource(shards.split("validation"), context, params)
    token_bytes = tokenizer.token_bytes()

    def validate(model: Transformer, compute: Compute) -> dict[str, float]:
        return language_loss(model, source.sweep(params.eval_batches), compute, token_bytes)

    return validate
