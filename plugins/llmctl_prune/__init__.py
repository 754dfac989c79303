"""Remove what matters least of a model: layers, heads, channels or weights."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

PRUNE = Stage(
    name="prune",
    help="Remove what matters least of a model: layers, heads, channels or weights.",
    inputs={
        "model": In("model.hf"),
        "calibration": In("dataset.chat", "dataset.tokens", help="what importance is measured on"),
    },
    outputs={"model": Out("model.hf"), "metrics": Out("metrics")},
    params="llmctl_prune.params:PruneParams",
    run="llmctl_prune.run:run",
    extra="train",
    headline=("parameters.removed", "sparsity"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `prune`."""
    return [PRUNE]
