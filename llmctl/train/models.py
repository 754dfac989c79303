"""How a training stage opens the model it starts from and leaves the one it made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmctl.errors import InputError
from llmctl.nn.hf import load_model, save_model
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.tokenizer import Tokenizer


def open_model(artifact: Artifact) -> tuple[Transformer, Tokenizer]:
    """A model directory's weights in float32 on the CPU and its tokenizer; InputError if they do not fit together."""
    model = load_model(artifact.path)
    tokenizer = Tokenizer.load(artifact.path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{artifact.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}",
            hint="the model was trained with another tokenizer",
        )
    return model, tokenizer


def write_model(
    ctx: Context, model: Transformer, tokenizer_from: Path, values: Mapping[str, float | int | str | bool]
) -> None:
    """Write the output `model` with its tokenizer, describe it, and report `values` with its size in bytes."""
    directory = ctx.output("model")
    save_model(model, directory, tokenizer_from=tokenizer_from)
    config = model.config
    ctx.describe(
        "model",
        architecture=config.arch,
        parameters=config.parameters(),
        vocab_size=config.vocab_size,
        context=config.context,
    )
    ctx.report({**values, "bytes": (directory / "model.safetensors").stat().st_size})
