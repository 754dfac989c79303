"""Train a tokenizer on the training split, and turn every split into token shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl import Artifact, Context, InputError, StageError, UsageError
from llmctl.text.cleaning.groups import group_of_row
from llmctl.text.datasets import info, read_rows, splits
from llmctl.text.tokenizer import Tokenizer, copy_tokenizer
from llmctl_tokenize.params import TokenizeParams

if TYPE_CHECKING:
    from llmctl_tokenize.special import SpecialTokens

SAMPLE = 32


def run(ctx: Context, params: TokenizeParams, text: Artifact, tokenizer: Artifact | None) -> None:
    """Produce what `params.emit` names; a bound tokenizer is passed through byte for byte."""
    if params.infill and "train" not in splits(text):
        raise UsageError(
            f"infill cuts documents of the split `train`, which {text.path} lacks",
            hint="leave infill out, or give a dataset with a split `train`",
        )
    trained = tokenizer is None
    directory = _trained(ctx, params, text) if tokenizer is None else tokenizer.path
    if ctx.wants("tokenizer"):
        copy_tokenizer(directory, ctx.output("tokenizer"))
    opened = Tokenizer.load(directory)
    if not trained:
        _check_bound(params, opened)
    _check_round_trip(ctx, opened, text, trained and params.lossless)
    ctx.report({"vocab_size": opened.vocab_size})
    if ctx.wants("tokenizer"):
        ctx.describe("tokenizer", vocab_size=opened.vocab_size, tokenizer=opened.digest)
    if ctx.wants("tokens"):
        from llmctl_tokenize.encoding import write_tokens
        from llmctl_tokenize.infill import Infill

        texts, counts = _texts_by_split(text), info(text).get("splits", {})
        if infill := Infill.of(params, opened):
            infill.check(opened, (found for _, _, found in islice(_documents(text, "train"), SAMPLE)))
        write_tokens(ctx, opened, texts, workers=params.workers, counts=counts, infill=infill)


def _check_bound(params: TokenizeParams, tokenizer: Tokenizer) -> None:
    """UsageError if parameters of training are set although there is nothing to train."""
    changed = params.changed()
    if params.vocab_size not in (TokenizeParams.model_fields["vocab_size"].default, tokenizer.vocab_size):
        changed.append("vocab_size")
    if changed:
        raise UsageError(
            f"{', '.join(changed)} cannot be set: the bound tokenizer ({tokenizer.vocab_size} tokens) is not trained",
            hint="drop these parameters, or do not bind a tokenizer",
        )


def _trained(ctx: Context, params: TokenizeParams, text: Artifact) -> Path:
    """Where the trained tokenizer lies; one that an interrupted run has left is not trained again."""
    directory = ctx.resume_dir / "tokenizer"
    if not directory.is_dir():
        part = ctx.resume_dir / "tokenizer.part"
        shutil.rmtree(part, ignore_errors=True)
        _train(ctx, params, text, part)
        part.rename(directory)
    return directory


def _train(ctx: Context, params: TokenizeParams, text: Artifact, directory: Path) -> None:
    from llmctl_tokenize import files, training
    from llmctl_tokenize.special import sentinel_names

    special = _special(params)
    tokenizer = training.train(lambda: _texts(ctx, text), params, special)
    reached = tokenizer.get_vocab_size()
    if reached > params.vocab_size:
        raise StageError(
            f"the text has so many characters that there are {reached} tokens, {params.vocab_size} were asked for",
            hint=f"set vocab_size to {reached} or more, or limit_alphabet to fewer characters",
        )
    if reached < params.vocab_size:
        lower = "" if params.kind == "unigram" else "lower min_frequency, "
        raise StageError(
            f"the text allows a vocabulary of {reached} tokens, {params.vocab_size} were asked for",
            hint=f"set vocab_size to {reached} or less, {lower}or give more text",
        )
    further = [*special.further, *reversed(sentinel_names(params.sentinel_count))]
    files.save(tokenizer, directory, special.names, further, special.template)


def _special(params: TokenizeParams) -> SpecialTokens:
    """The special tokens without sentinels. UsageError for one that is there twice or that text could be cut into."""
    from llmctl_tokenize import kinds
    from llmctl_tokenize.special import SPECIAL, sentinel_names

    unknown = params.covers != "byte-level" or params.kind == "unigram"
    special = SPECIAL[params.special].extended(params.own_special, unknown)
    every = [*special.tokens, *sentinel_names(params.sentinel_count)]
    if len({*every}) < len(every):
        raise UsageError(f"{_where(params)} names a token that special: {params.special} has already")
    untrained = kinds.untrained(params, every, special.unknown)
    for name in params.own_special:
        if kinds.is_spelt(untrained, params, name):
            raise UsageError(
                f"{_where(params)}: {name!r} could be a piece of plain text with kind: {params.kind}, pattern: "
                f"{params.cuts}; what a user types would become the special token",
                hint="mark it by signs that the pattern cuts off, as in <|end|>",
            )
    return special


def _where(params: TokenizeParams) -> str:
    """Where special tokens of one's own are named."""
    return "further_special or infill_tokens" if params.infill else "further_special"


def _texts(ctx: Context, text: Artifact) -> Iterator[str]:
    total = info(text).get("splits", {}).get("train", {}).get("rows")
    number = 0
    for number, _, found in _documents(text, "train"):
        if number % 100 == 0:
            ctx.progress(number, total, phase="train")
        yield found
    if number == 0:
        raise InputError("the training split is empty, there is nothing to train a tokenizer on")


def _texts_by_split(text: Artifact) -> dict[str, Iterator[tuple[str, str]]]:
    """(source, text) of every document."""
    return {name: ((source, found) for _, source, found in _documents(text, name)) for name in splits(text)}


def _documents(text: Artifact, split: str) -> Iterator[tuple[int, str, str]]:
    """(row number from 1, source, text); InputError for a row without text."""
    for number, row in enumerate(read_rows(text, split), start=1):
        found = row.get("text")
        if not isinstance(found, str):
            columns = ", ".join(sorted(row)) or "none"
            raise InputError(
                f"{text.path}: row {number} of `{split}` has no column `text`",
                hint=f"its columns are: {columns}; `llmctl data --column …` makes a dataset.text of other columns",
            )
        yield number, group_of_row(row, "source"), found


def _check_round_trip(ctx: Context, tokenizer: Tokenizer, text: Artifact, lossless: bool) -> None:
    """A sample of documents must come back as they were; a tokenizer that changes text is worth a warning."""
    for split in splits(text):
        for number, _, found in _documents(text, split):
            if number > SAMPLE:
                break
            if tokenizer.decode(tokenizer.encode(found), skip_special=False) != found:
                fault = f"the tokenizer does not give back document {number} of `{split}` as it was"
                if lossless:
                    raise StageError(fault, hint="this is a fault of llmctl; please report the text")
                ctx.warn(fault + "; it normalises text or does not know all of it")
                return
