"""Fine-tune a model on conversations or labelled rows."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

SFT = Stage(
    name="sft",
    help="Fine-tune a model on conversations or labelled rows.",
    inputs={"model": In("model.hf"), "data": In("dataset.chat", "dataset.labelled")},
    outputs={"model": Out("model.hf"), "metrics": Out("metrics")},
    params="llmctl_sft.params:SftParams",
    run="llmctl_sft.run:run",
    forecast="llmctl_sft.forecast:forecast",
    extra="train",
    headline=("loss.validation", "loss.train"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `sft`."""
    return [SFT]
