"""Vectors of words (word2vec, GloVe) and of texts (any encoder), what they say, and the commands that look at them."""

from __future__ import annotations

from llmctl import Command, In, Out, Stage, hookimpl

EMBED = Stage(
    name="embed",
    help="Make vectors of words (word2vec, GloVe) or of texts (an encoder).",
    inputs={
        "text": In("dataset.text", "dataset.labelled", "files", help="rows, or text files whose lines are the texts"),
        "model": In("model.hf", "model.onnx", optional=True, help="the encoder of method: encode"),
    },
    outputs={"vectors": Out("embeddings"), "metrics": Out("metrics")},
    params="llmctl_embed.params:EmbedParams",
    run="llmctl_embed.run:run",
    extra="train",
    rev=3,  # a sentence encoder reads as much as its max_seq_length says
    headline=("vectors", "loss"),
)
PROBE = Stage(
    name="probe",
    help="Measure what the states of models say about labelled words, checkpoint by checkpoint.",
    inputs={
        "models": In("model.hf", many=True, help="one model at several steps of its training"),
        "data": In("dataset.labelled", help="rows of words (`tokens`) with labels"),
    },
    outputs={"report": Out("report"), "metrics": Out("metrics")},
    params="llmctl_embed.probe_params:ProbeParams",
    run="llmctl_embed.probing:run",
    extra="train",
    headline=("labels.accuracy", "labels.selectivity"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stages `embed` and `probe`."""
    return [EMBED, PROBE]


@hookimpl
def register_commands() -> list[Command]:
    """Offer the group `embeddings`."""
    return [
        Command(
            name="embeddings",
            help="Look at vectors: neighbours, analogies, similarity, a map.",
            target="llmctl_embed.commands:embeddings",
        )
    ]
