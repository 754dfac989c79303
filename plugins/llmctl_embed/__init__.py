"""Vectors of words (word2vec, GloVe) and of texts (any encoder), and the commands that look at them."""

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
    rev=2,
    headline=("vectors", "loss"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `embed`."""
    return [EMBED]


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
