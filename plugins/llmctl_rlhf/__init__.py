"""Align a model with preferences."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

RLHF = Stage(
    name="rlhf",
    help="Align a model with preferences.",
    inputs={"model": In("model.hf"), "data": In("dataset.preference")},
    outputs={"model": Out("model.hf"), "metrics": Out("metrics")},
    params="llmctl_rlhf.params:RlhfParams",
    run="llmctl_rlhf.run:run",
    forecast="llmctl_rlhf.forecast:forecast",
    extra="train",
    headline=("accuracy.validation", "accuracy.train"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `rlhf`."""
    return [RLHF]
