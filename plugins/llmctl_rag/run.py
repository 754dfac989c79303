"""Index documents, then measure on questions: right document found, citations resolve, nonsense refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.encoders import open_text_encoder
from llmctl.text.datasets import read_rows, splits
from llmctl.text.dense import Dense, DenseSettings, Encoder, unit
from llmctl.text.retrieval import Chunk, Index
from llmctl.text.tokenizer import Tokenizer
from llmctl_rag.chunks import Chunker, Counter, words
from llmctl_rag.params import RagParams
from llmctl_rag.questions import Answerer, Document, measure

EVERY = 50
"""Documents between two progress events."""
EMBEDDED = 256
"""Chunks that are embedded between two progress events."""


def run(
    ctx: Context,
    params: RagParams,
    text: Artifact,
    questions: Artifact | None = None,
    model: Artifact | None = None,
    encoder: Artifact | None = None,
) -> None:
    """Write the index; with `questions`, measure retrieval, citations and refusal with it."""
    check_inputs(params, model, encoder)
    opened = open_text_encoder(encoder, params.device, params.threads) if encoder else None
    described, count = counter(model, encoder)
    documents, chunks = read_chunks(ctx, params, text, count)
    dense = embed_chunks(ctx, params, chunks, opened) if opened else None
    index = Index.build(chunks, k1=params.k1, b=params.b, per_document=params.per_document, dense=dense)
    settings = {"chunk_tokens": params.chunk_tokens, "chunk_overlap": params.chunk_overlap, **described}
    index.save(
        ctx.output("index"), documents=len(documents), settings=settings, ranking={"k1": params.k1, "b": params.b}
    )
    write_documents(ctx.output("index") / "documents.jsonl", documents)
    ctx.describe("index", chunks=len(chunks), documents=len(documents))
    ctx.report({"chunks": len(chunks), "documents": len(documents)})
    if questions is not None:
        measured = Index.load(ctx.output("index"), opened)  # what is measured is what was written
        ctx.report(measure(ctx, params, measured, documents, questions, Answerer.open(params, measured, model)))


def check_inputs(params: RagParams, model: Artifact | None, encoder: Artifact | None) -> None:
    """UsageError for an input that the parameters need and lack, and for an encoder without effect."""
    if params.answers != "extractive" and model is None:
        raise UsageError(
            f"answers: {params.answers} needs a model", hint="bind the input `model`, or use answers: extractive"
        )
    if params.retrieval != "lexical" and encoder is None:
        raise UsageError(
            f"retrieval: {params.retrieval} needs an encoder",
            hint="bind the input `encoder`, or use retrieval: lexical",
        )
    if params.retrieval == "lexical" and encoder is not None:
        raise UsageError(
            "the input `encoder` has no effect with retrieval: lexical", hint="use retrieval: dense or hybrid"
        )


def counter(model: Artifact | None, encoder: Artifact | None) -> tuple[dict[str, str], Counter]:
    """(what `index.json` says of the unit, the length of a text): in tokens of the model, of the encoder, or words."""
    given = model or (encoder if encoder is not None and encoder.type != "embeddings" else None)
    if given is None:
        return {"unit": "words", "tokenizer": ""}, words
    tokenizer = Tokenizer.load(given.path)
    return {"unit": "tokens", "tokenizer": tokenizer.digest}, lambda passage: len(tokenizer.encode(passage))


def embed_chunks(ctx: Context, params: RagParams, chunks: list[Chunk], encoder: Encoder) -> Dense:
    """The vectors of all chunks; a warning tells how many were too long for the encoder."""
    assert params.retrieval != "lexical"
    parts = []
    for begin in range(0, len(chunks), EMBEDDED):
        parts.append(encoder.embed([chunk.searched for chunk in chunks[begin : begin + EMBEDDED]]))
        ctx.progress(min(begin + EMBEDDED, len(chunks)), len(chunks))
        if ctx.should_stop():
            raise ctx.stopped(begin)
    matrix = np.concatenate(parts)
    if damaged := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise InputError(
            f"the encoder gives {damaged} of {len(chunks)} chunks vectors with NaN or infinity",
            hint="its weights are damaged, or too large for their number format: give another encoder",
        )
    matrix = unit(matrix)
    unknown = int((matrix == 0).all(axis=1).sum())
    if unknown == len(chunks):
        raise InputError("no chunk has a word that the encoder knows", hint="give vectors of words of this language")
    for count, why in (
        (encoder.cut, "are longer than the encoder reads and were cut"),
        (unknown, "have no known word"),
    ):
        if count:
            ctx.warn(f"{count} of {len(chunks)} chunks {why}: their meaning is found in part or not at all")
    return Dense(matrix, encoder, DenseSettings(params.retrieval, params.similar_above, params.rrf_k))


def read_chunks(
    ctx: Context, params: RagParams, text: Artifact, count: Counter
) -> tuple[dict[str, Document], list[Chunk]]:
    """(every document by id, all chunks). InputError for an empty corpus, an id that stands twice, or no text."""
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
