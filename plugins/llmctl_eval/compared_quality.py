"""What quality is measured on: windows of documents or of answers, the same for every variant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.text.datasets import read_rows
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl_eval.compare_params import CompareParams
from llmctl_eval.perplexity import windows
from llmctl_eval.variants import Variant

Row = tuple[np.ndarray, np.ndarray]
"""Ids of a document, and the bytes of each; 0 for what does not count, such as special tokens and questions."""


@dataclass(frozen=True)
class Quality:
    """The rows of the data, and how many bytes the counted tokens have."""

    rows: list[Row]
    bytes: int

    def measure(self, ctx: Context, variants: Sequence[Variant]) -> dict[str, dict[str, float]]:
        """Bits per byte of each variant and how often its likeliest token is the first variant's."""
        # The shortest context for all: what is not the same text does not compare.
        context = min(variant.context for variant in variants)
        for variant in variants:
            nats = 0.0
            for number, (ids, sizes) in enumerate(self.rows):
                if ctx.should_stop():
                    raise ctx.stopped(number)
                pieces = zip(windows(ids, context), windows(sizes, context), strict=True)
                for window, counted in pieces:
                    found = variant.ask("score", ids=window.tolist(), sizes=counted.tolist())
                    nats += found["nats"]
                    variant.top += found["top"]
            variant.nats = nats
        return {variant.name: self._numbers(ctx, variant, variants[0]) for variant in variants}

    def _numbers(self, ctx: Context, variant: Variant, first: Variant) -> dict[str, float]:
        if variant.nats is None or not math.isfinite(variant.nats):
            ctx.warn(f"variant {variant.name} gives no finite probabilities: it has no quality")
            return {}
        values = {"bits_per_byte": variant.nats / math.log(2) / self.bytes}
        if variant is not first:
            same = sum(a == b for a, b in zip(variant.top, first.top, strict=True))
            values["top1_agreement"] = same / len(first.top)
        return values


def read_quality(params: CompareParams, models: Sequence[Artifact], data: Artifact) -> Quality:
    """The rows up to `max_tokens`. InputError if the tokenizers differ, or nothing counts."""
    tokenizer = common_tokenizer(params, models)
    source = of_shards if data.type == "dataset.tokens" else of_chat
    rows: list[Row] = []
    tokens = 0
    for ids, sizes in source(params, tokenizer, data):
        tokens += len(ids)
        if rows and tokens > params.max_tokens:
            break
        rows.append((ids, sizes))
    # The first token of a document is given, nobody predicts it.
    total = sum(int(sizes[1:].sum()) for _, sizes in rows)
    if not total:
        raise InputError(
            f"split `{params.split}` of {data.path} holds no text to measure on", hint="choose another with `split`"
        )
    return Quality(rows, total)


def common_tokenizer(params: CompareParams, models: Sequence[Artifact]) -> Tokenizer:
    """The tokenizer of all bundles."""
    first, *others = [Tokenizer.load(model.path) for model in models]
    for tokenizer, model in zip(others, models[1:], strict=True):
        if tokenizer.digest != first.digest:
            raise UsageError(
                f"{model.path} has another tokenizer than {models[0].path}: their answers do not compare",
                hint="compare variants of one model, or leave `data` out",
            )
    return first


def of_shards(params: CompareParams, tokenizer: Tokenizer, data: Artifact) -> Iterator[Row]:
    """Whole documents."""
    shards = TokenShards.open(data)
    if shards.tokenizer != tokenizer.digest:
        raise InputError(
            f"the tokens in {data.path} are of another tokenizer than the variants'",
            hint="tokenize the text with their tokenizer: `llmctl tokenize --tokenizer MODEL`",
        )
    sizes = np.array(tokenizer.token_bytes())
    part = shards.split(params.split)
    for number in range(len(part)):
        ids = part.document(number).astype(np.int64)
        yield ids, sizes[ids]


def of_chat(params: CompareParams, tokenizer: Tokenizer, data: Artifact) -> Iterator[Row]:
    """Whole conversations, in which what the assistant says counts."""
    sizes = np.array(tokenizer.token_bytes())
    for number, row in enumerate(read_rows(data, params.split)):
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{data.path}: row {number} of split `{params.split}` has no messages")
        found = tokenizer.encode_chat(messages)
        ids = np.array(found.ids, np.int64)
        yield ids, sizes[ids] * np.array(found.mask)
