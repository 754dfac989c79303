"""Which code computes a model directory: our transformer where it can, else transformers, behind the same face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from llmctl.errors import InputError
from llmctl.nn.foreign import ForeignModel, load_foreign
from llmctl.nn.hf import load_config, load_model, save_model
from llmctl.nn.transformer import Transformer


def why_foreign(directory: Path) -> str:
    """Why our transformer does not compute a model, empty if it does. InputError without a readable `config.json`."""
    try:
        load_config(directory)
    except InputError as error:
        if not (Path(directory) / "config.json").is_file():
            raise
        return error.message
    return ""


def open_network(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    log: Callable[[str], None] | None = None,
) -> Transformer:
    """`load_model`, or for an architecture that is not ours a `ForeignModel`; `log` is told which and why.

    The declared type is that of nearly all models; a ForeignModel offers of it what training and generation use.
    Raises what both raise.
    """
    why = why_foreign(directory)
    if not why:
        model = load_model(directory, device, dtype)
        if log is not None:
            log(f"{model.config.arch}: computed by llmctl's transformer")
        return model
    try:
        foreign = load_foreign(directory, device, dtype)
    except InputError as error:
        raise InputError(f"{why}; and {error.message}", hint=error.hint) from error
    if log is not None:
        log(f"{foreign.config.arch}: computed by transformers, because {why}")
        if not foreign.packs:
            log("packed documents are computed in a row each: this family does not keep them apart by itself")
    return cast(Transformer, foreign)


def save_network(model: Transformer, directory: Path, tokenizer_from: Path | None = None) -> int:
    """Write what `open_network` has opened; the bytes of its weights' files."""
    if isinstance(model, ForeignModel):
        model.save(directory, tokenizer_from)
    else:
        save_model(model, directory, tokenizer_from)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
