"""`llmctl search`: what an index finds for a question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.console import table
from llmctl.store.commands import format_option, print_as, store_option

if TYPE_CHECKING:
    from llmctl.text.retrieval import Index, Passage

SHOWN = 60
"""Characters of a passage in the table."""


@click.command()
@click.argument("index")
@click.argument("questions", nargs=-1, required=True, metavar="QUESTION...")
@click.option("--encoder", help="Of an index that finds by meaning: the encoder that `rag` was given.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Passages for each question.")
@store_option
@format_option
def search(
    index: str, questions: tuple[str, ...], encoder: str | None, top: int, store_path: Path | None, format_: str
) -> None:
    """Show the passages that INDEX finds for each QUESTION, best first: their score, and how far they support it.

    INDEX and the encoder are directories or references. A question is one argument: quote it.
    """
    opened = open_index(index, encoder, store_path)
    value: list[dict[str, Any]] = [
        {"question": question, "passages": [_described(passage) for passage in opened.search(question, top)]}
        for question in questions
    ]
    print_as(format_, value, lambda: "\n\n".join(_table(one["question"], one["passages"]) for one in value))


def open_index(index: str, encoder: str | None, store: Path | None) -> Index:
    """The index, with its encoder on the CPU. InputError or UsageError as `Index.load` and `open_text_encoder`."""
    from llmctl.encoders import ENCODERS, open_text_encoder
    from llmctl.store.store import Store
    from llmctl.text.retrieval import Index

    opened = Store.open(store)
    given = open_text_encoder(opened.resolve(encoder, ENCODERS), "cpu") if encoder else None
    return Index.load(opened.resolve(index, ("index.rag",)), given)


def _described(passage: Passage) -> dict[str, Any]:
    chunk = passage.chunk
    place = {"id": chunk.id, "document": chunk.document, "start": chunk.start, "end": chunk.end, "text": chunk.text}
    return {**place, "score": passage.score, "support": passage.support}


def _table(question: str, passages: list[dict[str, Any]]) -> str:
    rows = [
        (one["id"], f"{one['score']:.4f}", f"{one['support']:.2f}", " ".join(one["text"].split())[:SHOWN])
        for one in passages
    ]
    return f"{question}\n" + (table(("PASSAGE", "SCORE", "SUPPORT", "TEXT"), rows) if rows else "nothing found")
