"""The documents on which importance and loss are measured, as packed batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.text import datasets
from llmctl.text.datasets import Row, read_rows
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.batches import Batch, Example, pack

ROWS = 16
"""Rows of one forward pass."""
SHORTEST_CHAT = 4
"""No conversation has fewer tokens, so this many rows always hold the tokens asked for."""


def splits(data: Artifact) -> list[str]:
    """Splits of the calibration data that hold anything."""
    if data.type == "dataset.tokens":
        shards = TokenShards.open(data)
        return [name for name in shards.splits if len(shards.split(name))]
    return datasets.splits(data)


def batches(
    data: Artifact, split: str, model: Path, *, context: int, vocab_size: int, tokens: int, seed: int, every_token: bool
) -> list[Batch]:
    """About `tokens` tokens of documents drawn from `split`, cut at `context`.

    `every_token`: all positions are picked, as importance wants it; else only what training would supervise (of a chat,
    what the assistant says). Raises InputError if the split is empty or was made with another tokenizer.
    """
    if data.type == "dataset.tokens":
        drawn = _documents(data, split, model, seed)
    else:
        drawn = _chats(data, split, model, tokens // SHORTEST_CHAT + 1, seed)
    examples: list[Example] = []
    left = tokens
    for example in drawn:
        if left <= 0:
            break
        ids, mask = example.ids[: min(left, context) + 1], example.mask[: min(left, context) + 1]
        mask = np.ones_like(mask) if every_token else mask
        if len(ids) > 1 and mask[1:].any():
            if int(ids.max()) >= vocab_size:
                raise InputError(f"{data.path} has token {ids.max()}, the model's vocabulary is {vocab_size}")
            examples.append(replace(example, ids=ids, mask=mask))
            left -= len(ids) - 1
    if not examples:
        raise InputError(f"the split `{split}` of {data.path} has nothing to calibrate on", hint="give more data")
    return [pack(part, context) for part in _parts(examples, ROWS * context)]


def _parts(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """Consecutive examples of at most `size` tokens together."""
    part: list[Example] = []
    filled = 0
    for example in examples:
        if part and filled + len(example) > size:
            yield part
            part, filled = [], 0
        part.append(example)
        filled += len(example)
    yield part


def _documents(data: Artifact, split: str, model: Path, seed: int) -> Iterator[Example]:
    shards = TokenShards.open(data)
    if shards.tokenizer != Tokenizer.load(model).digest:
        raise InputError(
            f"the tokens in {data.path} were made with another tokenizer than the model's",
            hint="tokenize with the model's own tokenizer",
        )
    found = shards.split(split)
    for index in np.random.default_rng(seed).permutation(len(found)):
        ids = found.document(int(index)).astype(np.int64)
        yield Example(ids, np.ones(len(ids), bool))


def _chats(data: Artifact, split: str, model: Path, count: int, seed: int) -> Iterator[Example]:
    tokenizer = Tokenizer.load(model)
    for row in _sample(read_rows(data, split), count, random.Random(seed)):
        if "messages" not in row:
            raise InputError(f"{data.path} has a row without `messages`", hint="calibrate on dataset.chat")
        chat = tokenizer.encode_chat(row["messages"])
        yield Example(np.array(chat.ids, np.int64), np.array(chat.mask, bool))


def _sample(rows: Iterable[Row], count: int, rng: random.Random) -> list[Row]:
    """`count` rows in random order, every row equally likely (reservoir), without holding them all."""
    stream = iter(rows)
    kept = list(itertools.islice(stream, count))
    for number, row in enumerate(stream, start=count):
        place = rng.randint(0, number)
        if place < count:
            kept[place] = row
    rng.shuffle(kept)
    return kept
