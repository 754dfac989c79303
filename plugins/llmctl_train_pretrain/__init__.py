"""Pre-train a language model, look up named models, look into trained ones, plan by scaling laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmctl import Artifact, Command, In, Out, Stage, hookimpl
from llmctl_train_pretrain.board import log_metrics as log_metrics

if TYPE_CHECKING:
    from llmctl.generator import Generator

TRAIN_PRETRAIN = Stage(
    name="train-pretrain",
    help="Pre-train a language model on token shards.",
    inputs={
        "tokens": In("dataset.tokens", many=True, help="token shards; several are mixed"),
        "tokenizer": In("tokenizer"),
        "model": In("model.hf", optional=True, help="continue from this model instead of a fresh one"),
    },
    outputs={"model": Out("model.hf"), "metrics": Out("metrics")},
    params="llmctl_train_pretrain.params:PretrainParams",
    run="llmctl_train_pretrain.run:run",
    forecast="llmctl_train_pretrain.forecast:forecast",
    extra="train",
    rev=3,  # Muon's defaults
    headline=("loss.validation", "loss.train"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `train-pretrain`."""
    return [TRAIN_PRETRAIN]


@hookimpl
def register_commands() -> list[Command]:
    """Offer `models`, `inspect` and `scaling`."""
    rows = (
        ("models", "List named models, or show one in numbers.", "models:models", ""),
        ("inspect", "Look into a model: next tokens, attention, lengths.", "inspecting:inspect", "train"),
        ("scaling", "Fit scaling laws; plan size and tokens from a budget.", "scaling.commands:scaling", ""),
    )
    return [Command(name=name, help=text, target=f"{__name__}.{at}", extra=extra) for name, text, at, extra in rows]


@hookimpl
def open_generator(artifact: Artifact, options: Mapping[str, Any]) -> Generator | None:
    """Generate with torch from a `model.hf` directory."""
    if artifact.type != "model.hf":
        return None
    from llmctl.train.generate import open_model

    return open_model(
        artifact.path, options.get("device", "auto"), options.get("threads", 0), options.get("dtype", "auto")
    )
