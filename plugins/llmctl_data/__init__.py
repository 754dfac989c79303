"""Read a corpus and derive text, conversations and preferences from it, or read labelled rows."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

DATA = Stage(
    name="data",
    help="Read a corpus and derive text, conversations and preferences from it, or read labelled rows.",
    inputs={
        "files": In(
            "files",
            optional=True,
            many=True,
            help="text, Markdown, HTML, PDF, JSONL, CSV, Parquet, XML or source files, packed or not",
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
            help="evaluation data that the steps `decontaminate` and `augment` look for",
        ),
        "there": In("model.hf", "model.onnx", optional=True, help="translates, for back-translation by `augment`"),
        "back": In("model.hf", "model.onnx", optional=True, help="translates back what `there` says"),
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
    rev=7,  # of licences in prose the whole list counts: `MIT, GPL-2.0` was taken for MIT
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `data`."""
    return [DATA]
