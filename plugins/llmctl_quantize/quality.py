"""What quantization costs and gains: bits per byte and top-1 agreement on held-out text, and decode speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from llmctl.errors import InputError
from llmctl.ort import OrtGenerator
from llmctl.ort.generator import prefill
from llmctl.stage import Artifact
from llmctl.text.datasets import read_rows, splits
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer

DECODED = 48
"""Tokens per round of the speed comparison."""

Progress = Callable[[int, int], None]


class Text:
    """One sequence: token ids, and the UTF-8 bytes that each stands for (0: not counted)."""

    def __init__(self, ids: list[int], bytes_each: np.ndarray) -> None:
        self.ids = ids
        self.bytes_each = bytes_each


Split = Callable[[list[str]], str]
"""Chooses one of the names of a data set's splits."""


def held_out(names: list[str]) -> str:
    """The split on which quality is measured."""
    return next((name for name in ("validation", "test") if name in names), names[0])


def training(names: list[str]) -> str:
    """The split from which something may be learned: not the held-out one, where there is another."""
    return next((name for name in ("train", *names) if name in names and name != held_out(names)), names[0])


def split_names(data: Artifact) -> list[str]:
    """The splits of token shards or conversations."""
    return list(TokenShards.open(data).splits if data.type == "dataset.tokens" else splits(data))


def sequences(data: Artifact, split: Split, model: Path, context: int, vocab_size: int, limit: int) -> list[Text]:
    """Sequences of at most `context` tokens of the split that `split` chooses, together about `limit` tokens.

    In conversations only what the assistant says counts, in documents all text; special tokens count for nothing.
    """
    tokenizer = Tokenizer.load(model)
    sizes = np.zeros(max(vocab_size, tokenizer.vocab_size), np.int64)
    sizes[: tokenizer.vocab_size] = tokenizer.token_bytes()
    read = _documents if data.type == "dataset.tokens" else _chats
    found: list[Text] = []
    total = 0
    for ids, mask in read(data, split, tokenizer, context):
        counted = sizes[ids] * mask
        if counted[1:].sum() == 0:
            continue
        found.append(Text(ids, counted))
        total += len(ids)
        if total >= limit:
            break
    if not found:
        raise InputError(f"{data.path} holds no text in the split that is read", hint="give text in each split")
    return found


def measure(before: OrtGenerator, after: OrtGenerator, texts: list[Text], progress: Progress) -> dict[str, float]:
    """Bits per byte of both on the same text, and how often their likeliest tokens agree."""
    bits = [0.0, 0.0]
    agreed = tokens = 0
    for done, text in enumerate(texts):
        counted = text.bytes_each[1:] > 0
        targets = np.asarray(text.ids[1:])[counted]
        best = []
        for index, generator in enumerate((before, after)):
            logits = generator.logits(text.ids)[:-1][counted].astype(np.float64)
            bits[index] -= _log_softmax_at(logits, targets).sum() / math.log(2)
            best.append(logits.argmax(axis=1))
        agreed += int((best[0] == best[1]).sum())
        tokens += len(targets)
        progress(done + 1, len(texts))
    size = sum(int(text.bytes_each[1:].sum()) for text in texts)
    return {
        "bits_per_byte": bits[1] / size,
        "bits_per_byte.before": bits[0] / size,
        "bits_per_byte.ratio": bits[1] / bits[0],
        "top1_agreement": agreed / tokens,
        "tokens_compared": tokens,
    }


def speed(before: OrtGenerator, after: OrtGenerator, rounds: int) -> dict[str, float]:
    """Tokens per second of single-stream decoding, both interleaved, medians over the rounds after a warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for generator, times in zip((before, after), seconds, strict=True):
            took = _decode(generator)
            if round_:
                times.append(took)
    rates = [1 / statistics.median(times) for times in seconds]
    return {
        "decode.tokens_per_s": rates[1],
        "decode.tokens_per_s.before": rates[0],
        "decode.speedup": rates[1] / rates[0],
    }


def _decode(generator: OrtGenerator) -> float:
    """Seconds per token of greedy decoding after a short prompt."""
    count = min(DECODED, generator.context_length - 2)
    rows = generator.rows(1, count + 2)
    token = int(prefill(rows, 0, [0, 0]).argmax())
    start = time.perf_counter()
    for _ in range(count):
        token = int(rows.step((token,))[0].argmax())
    return (time.perf_counter() - start) / count


def _log_softmax_at(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Natural log-probability of `targets (T,)` under `logits (T, V)`."""
    highest = logits.max(axis=1)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return logits[np.arange(len(targets)), targets] - total  # type: ignore[no-any-return]


def _documents(
    data: Artifact, split: Split, tokenizer: Tokenizer, context: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    shards = TokenShards.open(data)
    if shards.tokenizer != tokenizer.digest:
        raise InputError(
            f"{data.path} was made with another tokenizer ({shards.tokenizer}) than the model's ({tokenizer.digest})",
            hint="give tokens that were made with the model's own tokenizer",
        )
    tokens = shards.split(split(shards.splits)).tokens
    for start in range(0, len(tokens) - 1, context):
        ids = tokens[start : start + context].tolist()
        yield ids, np.ones(len(ids), np.int64)


def _chats(data: Artifact, split: Split, tokenizer: Tokenizer, context: int) -> Iterator[tuple[list[int], np.ndarray]]:
    for row in islice(read_rows(data, split(splits(data))), 10_000):
        found = tokenizer.encode_chat(row["messages"])
        yield found.ids[:context], np.asarray(found.mask[:context], np.int64)
