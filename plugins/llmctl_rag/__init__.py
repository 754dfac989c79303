"""Index documents, find passages, answer with citations or refuse."""

from __future__ import annotations

from llmctl import Command, In, Out, Stage, hookimpl

RAG = Stage(
    name="rag",
    help="Index documents, find passages, answer with citations or refuse.",
    inputs={
        "text": In("dataset.text"),
        "questions": In("dataset.chat", optional=True, help="questions whose right document is known"),
        "model": In("model.onnx", "model.hf", optional=True, help="writes the answers from what was found"),
        "encoder": In(
            "model.onnx",
            "model.hf",
            "embeddings",
            optional=True,
            help="retrieval by meaning: an encoder of texts, or vectors of words",
        ),
    },
    outputs={"index": Out("index.rag"), "metrics": Out("metrics")},
    params="llmctl_rag.params:RagParams",
    run="llmctl_rag.run:run",
    extra="rag",
    rev=3,  # a sentence encoder reads as much as its max_seq_length says
    headline=("recall@5.value", "chunks"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `rag`."""
    return [RAG]


@hookimpl
def register_commands() -> list[Command]:
    """Offer `search`."""
    return [
        Command(
            name="search",
            help="Find passages in an index of documents.",
            target="llmctl_rag.commands:search",
            extra="rag",
        )
    ]
