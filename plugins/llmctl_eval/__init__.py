"""Measure a model: perplexity, exact match, ranking, labelled tasks, with intervals; compare variants of it."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

EVAL = Stage(
    name="eval",
    help="Measure a model: perplexity, exact match, ranking, labelled tasks, with intervals.",
    inputs={
        "model": In("model.hf", "model.onnx"),
        "data": In(
            "dataset.tokens", "dataset.text", "dataset.chat", "dataset.preference", "dataset.labelled", many=True
        ),
        "reference": In("model.hf", "model.onnx", optional=True, help="report the rise over this model, paired"),
    },
    outputs={"metrics": Out("metrics")},
    params="llmctl_eval.params:EvalParams",
    run="llmctl_eval.run:run",
    extra="eval",
    rev=3,  # a sentence encoder reads as much as its max_seq_length says
    headline=(
        "exact_match.value",
        "ranking.value",
        "seq2seq.bleu",
        "classification.value",
        "question_answering.value",
        "token_classification.f1",
        "embedding.value",
        "perplexity.bits_per_byte",
    ),
)
COMPARE = Stage(
    name="compare",
    help="Compare variants of a model: size, speed, memory, quality.",
    inputs={
        "model": In("model.onnx", many=True, help="two or more bundles; ratios are to the first"),
        "data": In("dataset.tokens", "dataset.chat", optional=True, help="what quality is measured on"),
    },
    outputs={"report": Out("report"), "metrics": Out("metrics")},
    params="llmctl_eval.compare_params:CompareParams",
    run="llmctl_eval.comparing:run",
    extra="eval",
    headline=("pareto",),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stages `eval` and `compare`."""
    return [EVAL, COMPARE]
