"""Train a tokenizer on the training split, and turn every split into token shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmctl import Artifact, Context, InputError, StageError, UsageError
from llmctl.text.datasets import info, read_rows, splits
from llmctl.text.shards import ShardWriter
from llmctl.text.tokenizer import Tokenizer, copy_tokenizer
from llmctl_tokenize.params import TokenizeParams

BATCH_BYTES = 1 << 20
SAMPLE = 32
TRAINING = ("min_frequency", "pattern", "special", "sentinels")
"""Parameters without meaning for a tokenizer that exists, beside its size."""


def run(ctx: Context, params: TokenizeParams, text: Artifact, tokenizer: Artifact | None) -> None:
    """Produce what `params.emit` names; a bound tokenizer is passed through byte for byte."""
    trained = tokenizer is None
    if tokenizer is None:
        directory = ctx.output("tokenizer") if ctx.wants("tokenizer") else ctx.resume_dir
        directory.mkdir(parents=True, exist_ok=True)
        _train(ctx, params, text, directory)
    else:
        directory = tokenizer.path
        if ctx.wants("tokenizer"):
            copy_tokenizer(directory, ctx.output("tokenizer"))
    opened = Tokenizer.load(directory)
    if not trained:
        _check_bound(params, opened)
    _check_round_trip(ctx, opened, text, trained)
    ctx.report({"vocab_size": opened.vocab_size})
    if ctx.wants("tokenizer"):
        ctx.describe("tokenizer", vocab_size=opened.vocab_size, tokenizer=opened.digest)
    if ctx.wants("tokens"):
        _write_tokens(ctx, opened, text)


def _check_bound(params: TokenizeParams, tokenizer: Tokenizer) -> None:
    """UsageError if parameters of training are set although there is nothing to train."""
    fields = TokenizeParams.model_fields
    changed = [name for name in TRAINING if getattr(params, name) != fields[name].default]
    if params.vocab_size not in (fields["vocab_size"].default, tokenizer.vocab_size):
        changed.append("vocab_size")
    if changed:
        raise UsageError(
            f"{', '.join(changed)} cannot be set: the bound tokenizer ({tokenizer.vocab_size} tokens) is not trained",
            hint="drop these parameters, or do not bind a tokenizer",
        )


def _train(ctx: Context, params: TokenizeParams, text: Artifact, directory: Path) -> None:
    from llmctl_tokenize import bpe
    from llmctl_tokenize.special import SPECIAL

    special, sentinels = SPECIAL[params.special], params.sentinel_count
    tokenizer = bpe.train(
        _texts(ctx, text), params.vocab_size, params.min_frequency, params.pattern, special, sentinels
    )
    reached = tokenizer.get_vocab_size()
    if reached < params.vocab_size:
        raise StageError(
            f"the text allows a vocabulary of {reached} tokens, {params.vocab_size} were asked for",
            hint=f"set vocab_size to {reached} or less, lower min_frequency, or give more text",
        )
    bpe.save(tokenizer, directory, special, sentinels)


def _texts(ctx: Context, text: Artifact) -> Iterator[str]:
    total = info(text).get("splits", {}).get("train", {}).get("rows")
    number = 0
    for number, (_, found) in enumerate(_documents(text, "train"), start=1):
        if number % 100 == 0:
            ctx.progress(number, total, phase="train")
        yield found
    if number == 0:
        raise InputError("the training split is empty, there is nothing to train a tokenizer on")


def _documents(text: Artifact, split: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, text); InputError for a row without text."""
    for number, row in enumerate(read_rows(text, split), start=1):
        found = row.get("text")
        if not isinstance(found, str):
            columns = ", ".join(sorted(row)) or "none"
            raise InputError(
                f"{text.path}: row {number} of `{split}` has no column `text`",
                hint=f"its columns are: {columns}; `llmctl data --column …` makes a dataset.text of other columns",
            )
        yield number, found


def _check_round_trip(ctx: Context, tokenizer: Tokenizer, text: Artifact, trained: bool) -> None:
    """A sample of documents must come back as they were; a foreign tokenizer that changes text is worth a warning."""
    for split in splits(text):
        for number, found in _documents(text, split):
            if number > SAMPLE:
                break
            if tokenizer.decode(tokenizer.encode(found), skip_special=False) != found:
                fault = f"the tokenizer does not give back document {number} of `{split}` as it was"
                if trained:
                    raise StageError(fault, hint="this is a fault of llmctl; please report the text")
                ctx.warn(fault + "; it normalises text")
                return


def _write_tokens(ctx: Context, tokenizer: Tokenizer, text: Artifact) -> None:
    names = splits(text)
    listed = info(text).get("splits", {})
    total = sum(listed.get(name, {}).get("rows", 0) for name in names) or None
    done = 0
    writer = ShardWriter(
        ctx.output("tokens"), vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.digest, splits=names
    )
    content: dict[str, int] = dict.fromkeys(names, 0)
    with writer:
        for name in names:
            for batch in _batches(text, name):
                for found, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                    content[name] += len(ids)
                    writer.add(name, tokenizer.frame_document(ids), len(found.encode()))
                done += len(batch)
                ctx.progress(done, total, phase="encode")
    meta = writer.meta()
    counts = {name: entry["tokens"] for name, entry in meta["splits"].items()}
    ctx.describe("tokens", tokenizer=tokenizer.digest, vocab_size=tokenizer.vocab_size, tokens=sum(counts.values()))
    ctx.report({f"tokens.{name}": count for name, count in counts.items()})
    ctx.report(
        {
            f"bytes_per_token.{name}": meta["splits"][name]["bytes"] / count
            for name, count in content.items()
            if count  # BOS and EOS are not counted: they stand for no text
        }
    )


def _batches(text: Artifact, split: str) -> Iterator[list[str]]:
    """Texts in batches of about `BATCH_BYTES`, so that memory does not grow with the dataset."""
    batch: list[str] = []
    size = 0
    for _, found in _documents(text, split):
        batch.append(found)
        size += len(found)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
