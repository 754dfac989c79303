"""Index documents, then measure on questions: right document found, citations resolve, nonsense refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.text.datasets import read_rows, splits
from llmctl.text.retrieval import Chunk, Index
from llmctl.text.tokenizer import Tokenizer
from llmctl_rag.chunks import Chunker, words
from llmctl_rag.params import RagParams
from llmctl_rag.questions import Answerer, Document, measure

EVERY = 50
"""Documents between two progress events."""


def run(
    ctx: Context,
    params: RagParams,
    text: Artifact,
    questions: Artifact | None = None,
    model: Artifact | None = None,
) -> None:
    """Write the index; with `questions`, measure retrieval, citations and refusal with it."""
    if params.answers != "extractive" and model is None:
        raise UsageError(
            f"answers: {params.answers} needs a model", hint="bind the input `model`, or use answers: extractive"
        )
    tokenizer = Tokenizer.load(model.path) if model else None
    documents, chunks = read_chunks(ctx, params, text, tokenizer)
    index = Index.build(chunks, k1=params.k1, b=params.b, per_document=params.per_document)
    counter = {"unit": "tokens", "tokenizer": tokenizer.digest} if tokenizer else {"unit": "words", "tokenizer": ""}
    settings = {"chunk_tokens": params.chunk_tokens, "chunk_overlap": params.chunk_overlap, **counter}
    index.save(
        ctx.output("index"), documents=len(documents), settings=settings, ranking={"k1": params.k1, "b": params.b}
    )
    write_documents(ctx.output("index") / "documents.jsonl", documents)
    ctx.describe("index", chunks=len(chunks), documents=len(documents))
    ctx.report({"chunks": len(chunks), "documents": len(documents)})
    if questions is not None:
        measured = Index.load(ctx.output("index"))  # what is measured is what was written
        ctx.report(measure(ctx, params, measured, documents, questions, Answerer.open(params, measured, model)))


def read_chunks(
    ctx: Context, params: RagParams, text: Artifact, tokenizer: Tokenizer | None
) -> tuple[dict[str, Document], list[Chunk]]:
    """(every document by id, all chunks). InputError for an empty corpus, an id that stands twice, or no text."""
    count = (lambda passage: len(tokenizer.encode(passage))) if tokenizer else words
    chunker = Chunker(count, params.chunk_tokens, params.chunk_overlap)
    documents: dict[str, Document] = {}
    chunks: list[Chunk] = []
    for number, row in enumerate(read_documents(text, params.split), start=1):
        if row["id"] in documents:
            raise InputError(f"the document id {row['id']!r} stands twice in {text.path}", hint="give each its own id")
        document = documents[row["id"]] = Document(row["text"], str(row.get("source") or ""))
        chunks += chunker.chunks(row["id"], document.text, document.source)
        if number % EVERY == 0:
            ctx.progress(number, chunks=len(chunks))
            if ctx.should_stop():
                raise ctx.stopped(number)
    if not chunks:
        raise InputError(f"{text.path} holds no text to index", hint="give a dataset.text with at least one document")
    return documents, chunks


def read_documents(text: Artifact, split: str) -> Iterator[dict[str, Any]]:
    """The rows of one split, or of all; InputError names the row that lacks an id or text."""
    for name in [split] if split else splits(text):
        for number, row in enumerate(read_rows(text, name)):
            if not isinstance(row.get("text"), str):
                raise InputError(f"{text.path}: row {number} of split `{name}` has no text", hint="rows are {id, text}")
            yield {**row, "id": str(row.get("id", f"{name}/{number}"))}


def write_documents(path: Path, documents: dict[str, Document]) -> None:
    """One line per document with the sha256 of its text, so that a changed document can be told."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for name, document in documents.items():
            digest = "sha256:" + hashlib.sha256(document.text.encode()).hexdigest()
            file.write(json.dumps({"id": name, "digest": digest}, ensure_ascii=False) + "\n")
