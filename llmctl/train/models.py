"""How a training stage opens the model it starts from and leaves the one it made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmctl.errors import InputError, UsageError
from llmctl.nn.opening import open_network, save_network
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.tokenizer import Tokenizer


def open_model(artifact: Artifact, ctx: Context | None = None) -> tuple[Transformer, Tokenizer]:
    """A model directory's weights in float32 on the CPU and its tokenizer; InputError if they do not fit together.

    The log of `ctx` is told which code computes it: llmctl's transformer, or transformers behind the same face.
    """
    model = open_network(artifact.path, log=None if ctx is None else ctx.log)
    tokenizer = Tokenizer.load(artifact.path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{artifact.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}",
            hint="the model was trained with another tokenizer",
        )
    return model, tokenizer


def check_decoder(model: Transformer, what: str) -> None:
    """UsageError unless `model` is a decoder that says which token comes next; `what` needs one ("conversations")."""
    config = model.config
    if config.traits.kind != "decoder":
        raise UsageError(
            f"{what} need a decoder, {config.arch} is an {config.traits.kind}",
            hint="`sft` has labelled rows for it: seq2seq for an encoder-decoder, classification and others for an "
            "encoder",
        )
    if config.head != "lm":
        raise UsageError(
            f"{what} need a decoder with a head over tokens, this {config.arch} has the head {config.head}",
            hint="give the model that it was fine-tuned from",
        )


def write_model(
    ctx: Context, model: Transformer, tokenizer_from: Path, values: Mapping[str, float | int | str | bool]
) -> None:
    """Write the output `model` with its tokenizer, describe it, and report `values` with its size in bytes."""
    directory = ctx.output("model")
    size = save_network(model, directory, tokenizer_from)
    config = model.config
    ctx.describe(
        "model",
        architecture=config.arch,
        parameters=config.parameters(),
        vocab_size=config.vocab_size,
        context=config.context,
    )
    ctx.report({**values, "bytes": size})
