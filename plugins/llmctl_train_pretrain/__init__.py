"""Pre-train a language model on token shards."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

TRAIN_PRETRAIN = Stage(
    name="train-pretrain",
    help="Pre-train a language model on token shards.",
    inputs={
        "tokens": In("dataset.tokens"),
        "tokenizer": In("tokenizer"),
        "model": In("model.hf", optional=True, help="continue from this model instead of a fresh one"),
    },
    outputs={"model": Out("model.hf"), "metrics": Out("metrics")},
    params="llmctl_train_pretrain.params:PretrainParams",
    run="llmctl_train_pretrain.run:run",
    extra="train",
    headline=("loss.validation", "loss.train"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `train-pretrain`."""
    return [TRAIN_PRETRAIN]
