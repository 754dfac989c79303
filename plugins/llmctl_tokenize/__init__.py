"""Train a tokenizer, write token shards, or both; compare, inspect and import tokenizers."""

from __future__ import annotations

from llmctl import Command, In, Out, Stage, hookimpl

TOKENIZE = Stage(
    name="tokenize",
    help="Train a tokenizer, write token shards, or both.",
    inputs={
        "text": In("dataset.text"),
        "tokenizer": In("tokenizer", optional=True, help="use this one instead of training"),
    },
    outputs={"tokenizer": Out("tokenizer"), "tokens": Out("dataset.tokens"), "metrics": Out("metrics")},
    params="llmctl_tokenize.params:TokenizeParams",
    run="llmctl_tokenize.run:run",
    key_deps=("tokenizers",),
    headline=("bytes_per_token.validation", "vocab_size"),
    rev=4,  # meta.json of the shards counts by source
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `tokenize`."""
    return [TOKENIZE]


@hookimpl
def register_commands() -> list[Command]:
    """Offer `tokenizers`."""
    return [
        Command(
            name="tokenizers",
            help="Compare, inspect, import and try tokenizers.",
            target="llmctl_tokenize.commands:tokenizers",
        )
    ]
