"""Perplexity and bits per byte over whole documents, and baselines on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmctl import Artifact, Context, InputError
from llmctl.text.shards import SplitTokens, TokenShards
from llmctl_eval.baselines import KneserNeyBigram, pairs, xz_bits_per_byte
from llmctl_eval.intervals import Bootstrap
from llmctl_eval.params import EvalParams
from llmctl_eval.samples import Sample, SampleLog, collect
from llmctl_eval.subject import Subject


def windows(document: np.ndarray, context: int) -> Iterator[np.ndarray]:
    """Pieces of at most `context` tokens in which every token but the first is predicted exactly once."""
    for start in range(0, max(len(document) - 1, 0), context - 1):
        yield document[start : start + context]


def score_document(subject: Subject, document: np.ndarray, sizes: np.ndarray) -> Sample:
    """Nats, tokens and bytes of a document; special tokens count 0 nats and 0 bytes."""
    nats, tokens, size = 0.0, 0, 0
    for window in windows(document, subject.generator.context_length):
        target = sizes[window[1:]]
        scores = subject.generator.logprobs(window.tolist()).astype(np.float64)
        nats -= float(scores[target > 0].sum())
        tokens += int(np.count_nonzero(target))
        size += int(target.sum())
    return {"nats": nats, "tokens": tokens, "bytes": size}


def perplexity(
    ctx: Context, params: EvalParams, subject: Subject, data: Artifact, split: str, log: SampleLog, boot: Bootstrap
) -> dict[str, float]:
    """The metrics of task `perplexity`. InputError if the tokens are of another tokenizer, or there are none."""
    shards = TokenShards.open(data)
    if shards.tokenizer != subject.tokenizer.digest:
        raise InputError(
            f"the tokens in {data.path} are of another tokenizer than the model's",
            hint="tokenize the text with the model's tokenizer: `llmctl tokenize --tokenizer MODEL`",
        )
    part = shards.split(split)
    documents = choose_documents(part, params)
    sizes = np.array(subject.tokenizer.token_bytes())
    rows = [part.document(i) for i in range(documents)]

    def score(batch: Sequence[np.ndarray]) -> list[Sample]:
        return [score_document(subject, document, sizes) for document in batch]

    samples = [sample for sample in collect(ctx, log, rows, score, 1, "perplexity") if sample["tokens"]]
    if not samples:
        raise no_text(params, f"split `{split}` of {data.path}", documents, len(part))
    found = summary(samples, boot)
    if "kneser-ney-bigram" in params.baselines:
        found |= bigram_metrics(shards, part, documents, sizes, found["perplexity.nats"])
    if "xz" in params.baselines:
        text = "".join(subject.tokenizer.decode(row.tolist()) for row in rows)
        found["perplexity.xz_bits_per_byte"] = xz_bits_per_byte(text.encode())
    return found


def choose_documents(part: SplitTokens, params: EvalParams) -> int:
    """How many documents from the start are measured on: `limit`, and whole ones within `max_tokens`."""
    count = len(part) if params.limit is None else min(params.limit, len(part))
    if params.max_tokens is not None:
        # At least one document, however long it is.
        count = min(count, max(1, int(np.searchsorted(part.offsets, params.max_tokens, side="right")) - 1))
    return count


def no_text(params: EvalParams, where: str, documents: int, there: int) -> InputError:
    """The error that only empty documents were measured on, and what to raise if there are more behind them."""
    if documents == there:
        return InputError(f"{where} holds no text to measure on", hint="choose another with `split`")
    given = {"limit": params.limit, "max_tokens": params.max_tokens}
    names = " or ".join(f"`{name}` ({value})" for name, value in given.items() if value is not None)
    first = "the first document is" if documents == 1 else f"the first {documents} documents are"
    return InputError(f"{where} holds no text to measure on: {first} empty", hint=f"there are {there}; raise {names}")


def summary(samples: Sequence[Sample], boot: Bootstrap) -> dict[str, float]:
    """Nats per token and bits per byte over all documents; the interval resamples documents."""
    nats = [sample["nats"] for sample in samples]
    tokens = [sample["tokens"] for sample in samples]
    per_token = boot.ratio(nats, tokens)
    return {
        **per_token.named("perplexity.nats", "_"),
        "perplexity.value": math.exp(per_token.value),
        "perplexity.bits_per_byte": sum(nats) / math.log(2) / sum(sample["bytes"] for sample in samples),
        "perplexity.tokens": sum(tokens),
        "perplexity.documents": len(samples),
    }


def bigram_metrics(
    shards: TokenShards, part: SplitTokens, documents: int, sizes: np.ndarray, nats: float
) -> dict[str, Any]:
    """Nats per token of the bigram model of the training tokens, on the tokens that the model was measured on."""
    train = shards.split("train")
    model = KneserNeyBigram(train.tokens[:], train.offsets, shards.vocab_size)
    offsets = part.offsets[: documents + 1]
    previous, following = pairs(part.tokens[: int(offsets[-1])], offsets)
    counted = sizes[following] > 0
    bigram = float(-np.log(model.probabilities(previous[counted], following[counted])).mean())
    return {"perplexity.bigram_nats": bigram, "perplexity.nats_below_bigram": bigram - nats}
