"""Turn texts into token shards: worker processes encode, one process writes in order, an interrupted run goes on.

What is written never depends on the number of workers. Memory is bounded: two batches of `BATCH_BYTES` per worker.
After every `CHECKPOINT_BYTES` of text the files are flushed to disk and `meta.json` says how far they are good.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import Context, MachineError
from llmctl.text.shards import Counts, Encoded, ShardWriter, token_dtype
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize.infill import Infill

Sourced = tuple[str, str]
"""The source of a document and its text."""
BATCH_BYTES = 1 << 20
CHECKPOINT_BYTES = 64 << 20
WORTH_WORKERS = 32 << 20
"""Bytes of text from which starting processes pays."""
_tokenizer: Tokenizer | None = None
"""In a worker process: the tokenizer that it encodes with."""


def write_tokens(
    ctx: Context,
    tokenizer: Tokenizer,
    texts: Mapping[str, Iterator[Sourced]],
    *,
    workers: int | None,
    counts: Mapping[str, Mapping[str, int]],
    infill: Infill | None,
) -> None:
    """Encode the texts of every split into the output `tokens`; `counts` are their rows and bytes, where known.

    `infill` cuts documents of the split `train`; the loss on any other compares with that of a model without it.
    """
    directory = ctx.resume_dir / "tokens"
    writer = ShardWriter(
        directory,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.digest,
        splits=list(texts),
        resume=_unfinished(directory, tokenizer, list(texts)),
    )
    size = sum(counts.get(name, {}).get("bytes", 0) for name in texts)
    total = sum(counts.get(name, {}).get("rows", 0) for name in texts) or None
    with writer, _Encoders(tokenizer, worker_count(workers, size)) as encoders:
        since, done = 0, sum(writer.documents(name) for name in texts)
        for name, found in texts.items():
            first = writer.documents(name)
            rest = islice(found, first, None)
            for encoded in encoders.encode(batches(rest), first, infill if name == "train" else None):
                writer.add_encoded(name, encoded)
                since, done = since + encoded.bytes, done + len(encoded.lengths)
                ctx.progress(done, total, phase="encode")
                if stop := ctx.should_stop():
                    encoders.drop()
                if stop or since >= CHECKPOINT_BYTES:
                    writer.checkpoint()
                    since = 0
                if stop:
                    raise ctx.stopped(done)
    for path in directory.iterdir():
        shutil.move(path, ctx.output("tokens") / path.name)
    _describe(ctx, tokenizer, writer.meta(), infill)


def _unfinished(directory: Path, tokenizer: Tokenizer, splits: list[str]) -> dict[str, Any] | None:
    """What an interrupted run has left of the same shards."""
    try:
        found: dict[str, Any] = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = found.get("tokenizer") == tokenizer.digest and list(found.get("splits", {})) == sorted(splits)
    return found if same else None


def _describe(ctx: Context, tokenizer: Tokenizer, meta: Mapping[str, Any], infill: Infill | None) -> None:
    counts = {name: entry["tokens"] for name, entry in meta["splits"].items()}
    ctx.describe("tokens", tokenizer=tokenizer.digest, vocab_size=tokenizer.vocab_size, tokens=sum(counts.values()))
    ctx.report({f"tokens.{name}": count for name, count in counts.items()})
    frame = len(tokenizer.opening) + len(tokenizer.closing)
    marks = 0
    if infill and "train" in meta["splits"]:
        orders = infill.counts(meta["splits"]["train"]["documents"])
        ctx.report({f"infill.{order}": count for order, count in orders.items()})
        marks = 3 * (orders["psm"] + orders["spm"])
    for name, entry in meta["splits"].items():
        # BOS, EOS and the marks of infill are not counted: they stand for no text.
        if content := entry["tokens"] - frame * entry["documents"] - (marks if name == "train" else 0):
            ctx.report({f"bytes_per_token.{name}": entry["bytes"] / content})


def batches(texts: Iterator[Sourced]) -> Iterator[list[Sourced]]:
    """Documents in batches of about `BATCH_BYTES`, so that memory does not grow with the dataset."""
    batch: list[Sourced] = []
    size = 0
    for source, text in texts:
        batch.append((source, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def worker_count(workers: int | None, size: int) -> int:
    """How many processes encode `size` bytes of text; 0 means none but this one, with a thread per core."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if size > WORTH_WORKERS and cores > 1 else 0


def encode(tokenizer: Tokenizer, documents: list[Sourced], first: int = 0, infill: Infill | None = None) -> Encoded:
    """The documents of a batch, number `first` of the split and those after it, each between BOS and EOS."""
    opening, closing = tokenizer.opening, tokenizer.closing
    texts = [text for _, text in documents]
    found = infill.encode(tokenizer, texts, first) if infill else tokenizer.encode_batch(texts)
    frame = len(opening) + len(closing)
    lengths = np.fromiter((len(ids) + frame for ids in found), np.int64, len(found))
    parts = chain.from_iterable((opening, ids, closing) for ids in found) if frame else iter(found)
    # In 32 bits first: what does not fit the vocabulary is found by the writer, not wrapped here.
    flat = np.fromiter(chain.from_iterable(parts), np.uint32, int(lengths.sum()))
    if len(flat) and flat.max() < tokenizer.vocab_size:
        flat = flat.astype(token_dtype(tokenizer.vocab_size))
    sizes = [len(text.encode()) for _, text in documents]
    sources = _by_source([source for source, _ in documents], lengths.tolist(), sizes)
    return Encoded(flat, lengths, sum(sizes), sources)


def _by_source(sources: list[str], lengths: list[int], sizes: list[int]) -> dict[str, Counts]:
    """Documents, tokens and bytes of each source."""
    found: dict[str, Counts] = {}
    for source, tokens, size in zip(sources, lengths, sizes, strict=True):
        counts = found.setdefault(source, {"documents": 0, "tokens": 0, "bytes": 0})
        counts["documents"] += 1
        counts["tokens"] += tokens
        counts["bytes"] += size
    return found


class _Encoders:
    """Encodes batches in order, in worker processes if there are any. A context manager."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer, self._workers = tokenizer, workers
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[Future[Encoded]] = deque()

    def __enter__(self) -> _Encoders:
        if self._workers:
            self._pool = ProcessPoolExecutor(
                self._workers,
                # Not fork: the threads of `tokenizers` do not survive it.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(str(self._tokenizer.directory),),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def drop(self) -> None:
        """Forget what waits to be encoded."""
        for future in self._pending:
            future.cancel()

    def encode(self, batches: Iterator[list[Sourced]], first: int, infill: Infill | None) -> Iterator[Encoded]:
        """The batches, encoded; at most two per worker are under way. MachineError if a worker is lost.

        `first` is the number of the first document, which the choices of `infill` hang on.
        """
        numbered = _numbered(batches, first)
        if self._pool is None:
            yield from (encode(self._tokenizer, batch, number, infill) for number, batch in numbered)
            return
        try:
            for number, batch in numbered:
                self._pending.append(self._pool.submit(_encode, batch, number, infill))
                if len(self._pending) > 2 * self._workers:
                    yield self._pending.popleft().result()
            while self._pending:
                yield self._pending.popleft().result()
        except BrokenProcessPool as error:
            raise MachineError(
                "a process that encodes was lost, perhaps for want of memory",
                hint="run again with fewer workers; it goes on where it stopped",
            ) from error


def _numbered(batches: Iterator[list[Sourced]], first: int) -> Iterator[tuple[int, list[Sourced]]]:
    """(number of its first document, batch)."""
    for batch in batches:
        yield first, batch
        first += len(batch)


def _start_worker(directory: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    _tokenizer = Tokenizer.load(directory)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(), os._exit), daemon=True).start()


def _end_with(parent: Any, end: Callable[[int], Any]) -> None:
    """End this process with its parent: after `kill -9` nobody else would tell it."""
    wait([parent.sentinel])
    end(1)


def _encode(documents: list[Sourced], first: int, infill: Infill | None) -> Encoded:
    assert _tokenizer is not None
    return encode(_tokenizer, documents, first, infill)
