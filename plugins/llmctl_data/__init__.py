"""Read a corpus and derive text, conversations and preferences from it, or read labelled rows."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

DATA = Stage(
    name="data",
    help="Read a corpus and derive text, conversations and preferences from it, or read labelled rows.",
    inputs={
        "files": In(
            "files", optional=True, many=True, help="text, Markdown, JSONL or Parquet files; CSV for labelled rows"
        ),
        "text": In("dataset.text", optional=True, help="text to work on instead of reading files"),
        "evaluation": In(
            "dataset.text",
            "dataset.chat",
            "dataset.preference",
            "dataset.labelled",
            "files",
            optional=True,
            many=True,
            help="evaluation data that the step `decontaminate` looks for",
        ),
    },
    outputs={
        "text": Out("dataset.text"),
        "chat": Out("dataset.chat"),
        "preference": Out("dataset.preference"),
        "labelled": Out("dataset.labelled"),
        "metrics": Out("metrics"),
    },
    params="llmctl_data.params:DataParams",
    run="llmctl_data.run:run",
    extra="data",
    key_deps=("python",),  # the reader `python-stdlib` reads the running interpreter's library
    headline=("text.documents",),
    rev=2,  # labelled rows are an output
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `data`."""
    return [DATA]
