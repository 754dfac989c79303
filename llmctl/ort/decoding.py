"""From logits to answers, one row or many side by side; the same for decoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.ort.cache import Rows
from llmctl.ort.sampling import Sampler


def answer(rows: Rows, logits: np.ndarray, room: int, sampling: Sampling, eos_ids: frozenset[int]) -> Iterator[int]:
    """Yield up to `room` tokens of a single row, the first of them chosen from `logits (V,)`."""
    sample = Sampler(sampling)
    for left in reversed(range(room)):
        token = sample(logits)
        if token in eos_ids:
            return
        yield token
        if left:
            logits = rows.step((token,))[0]


def answers(
    rows: Rows, logits: np.ndarray, rooms: Sequence[int], sampling: Sampling, eos_ids: frozenset[int]
) -> list[list[int]]:
    """Up to `rooms[i]` tokens of each row, the first ones chosen from `logits (B, V)`."""
    samplers = [Sampler(sampling) for _ in rooms]
    found: list[list[int]] = [[] for _ in rooms]
    # `alive[i]` is the answer that row i goes on with, None once it has ended.
    alive: list[int | None] = list(range(len(rooms)))
    while True:
        tokens = [0] * len(alive)
        for row, index in enumerate(alive):
            if index is None:
                continue
            token = samplers[index](logits[row])
            if token in eos_ids:
                alive[row] = None
                continue
            found[index].append(token)
            tokens[row] = token
            if len(found[index]) == rooms[index]:
                alive[row] = None
        going = [row for row, index in enumerate(alive) if index is not None]
        if not going:
            return found
        if len(going) <= len(alive) // 2:
            rows, alive, tokens = rows.keep(going), [alive[row] for row in going], [tokens[row] for row in going]
        else:
            # A row that has ended stays where it is, so that it never outgrows the cache.
            rows.lengths[[row for row, index in enumerate(alive) if index is None]] -= 1
        logits = rows.step(tokens)


def check_ids(tokens: Sequence[int], vocab_size: int) -> None:
    """UsageError if an id is outside the vocabulary."""
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        raise UsageError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}",
            hint="was the text encoded with this model's own tokenizer?",
        )


def chosen_logprobs(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Natural log-probability of each of `tokens` under its row of `logits (len(tokens), V)`, float32."""
    logits = logits.astype(np.float64)
    highest = logits.max(axis=1, initial=-np.inf)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return (logits[np.arange(len(tokens)), np.asarray(tokens, np.int64)] - total).astype(np.float32)
