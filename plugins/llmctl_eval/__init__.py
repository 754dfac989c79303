"""Measure a model: perplexity, exact match, ranking, with intervals."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

EVAL = Stage(
    name="eval",
    help="Measure a model: perplexity, exact match, ranking, with intervals.",
    inputs={
        "model": In("model.hf", "model.onnx"),
        "data": In("dataset.tokens", "dataset.chat", "dataset.preference", many=True),
        "reference": In("model.hf", "model.onnx", optional=True, help="report the rise over this model, paired"),
    },
    outputs={"metrics": Out("metrics")},
    params="llmctl_eval.params:EvalParams",
    run="llmctl_eval.run:run",
    extra="eval",
    headline=("exact_match.value", "ranking.value", "perplexity.bits_per_byte"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `eval`."""
    return [EVAL]
