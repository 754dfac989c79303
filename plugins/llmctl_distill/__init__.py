"""Train a student to give its teacher's answers."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

DISTILL = Stage(
    name="distill",
    help="Train a student to give its teacher's answers.",
    inputs={
        "teacher": In("model.hf"),
        "student": In("model.hf"),
        "data": In("dataset.chat", "dataset.tokens"),
    },
    outputs={
        "model": Out("model.hf"),
        "answers": Out("dataset.chat", help="method: sequences, what the teacher wrote"),
        "metrics": Out("metrics"),
    },
    params="llmctl_distill.params:DistillParams",
    run="llmctl_distill.run:run",
    forecast="llmctl_distill.forecast:forecast",
    extra="train",
    rev=3,  # what a teacher writes is an output, `answers`
    headline=("kl.validation", "kl.train"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `distill`."""
    return [DISTILL]
