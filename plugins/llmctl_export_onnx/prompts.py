"""The prompts on which an exported model is compared with the original."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from llmctl.errors import InputError
from llmctl.stage import Artifact

LONGEST = 1024
"""Tokens of the one long prompt; it spans several prefill chunks where the context allows."""


def draw(data: Artifact | None, model: Path, vocab_size: int, limit: int, count: int, seed: int) -> list[list[int]]:
    """`count` prompts of at most `limit` tokens: one as long as it may be, then from `data`, then random ones.

    Conversations come without their last answer, token shards as windows; from the held-out split if it holds anything.
    Equal arguments give equal prompts.
    """
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, vocab_size, min(limit, LONGEST)).tolist()]
    if data is not None:
        found = (
            _windows(data, vocab_size, limit, count, random) if data.type == "dataset.tokens" else _chats(data, model)
        )
        prompts += [prompt[-limit:] for prompt in islice(found, count - 1) if prompt]
    while len(prompts) < count:
        prompts.append(random.integers(0, vocab_size, random.integers(1, min(limit, 64) + 1)).tolist())
    return prompts[:count]


def _held_out_first(splits: list[str]) -> list[str]:
    return sorted(splits, key=lambda name: (name != "validation", name != "test"))


def _chats(data: Artifact, model: Path) -> list[list[int]]:
    from llmctl.text.datasets import read_rows, splits
    from llmctl.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model)
    read = (list(islice(read_rows(data, split), 1000)) for split in _held_out_first(splits(data)))
    rows = next((rows for rows in read if rows), [])
    return [tokenizer.encode_chat(row["messages"][:-1], add_generation_prompt=True).ids for row in rows]


def _windows(data: Artifact, vocab_size: int, limit: int, count: int, random: np.random.Generator) -> list[list[int]]:
    from llmctl.text.shards import TokenShards

    shards = TokenShards.open(data)
    if shards.vocab_size > vocab_size:
        raise InputError(
            f"{data.path} has a vocabulary of {shards.vocab_size}, the model one of {vocab_size}",
            hint="give tokens that were made with the model's own tokenizer",
        )
    read = (shards.split(split).tokens for split in _held_out_first(shards.splits))
    tokens = next((tokens for tokens in read if len(tokens)), None)
    if tokens is None:
        return []
    lengths = random.integers(1, min(limit, 64, len(tokens)) + 1, count)
    starts = [int(random.integers(0, len(tokens) - length + 1)) for length in lengths]
    return [tokens[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]
