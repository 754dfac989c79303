"""Rows of tokens in flight in the torch model, and what it remembers of them: the `Rows` of `llmctl.decoding`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from llmctl.nn.attention import KVCache
from llmctl.nn.transformer import Transformer


class TorchRows:
    """Rows over one preallocated cache; they may differ in length."""

    def __init__(self, model: Transformer, cache: KVCache, lengths: list[int]) -> None:
        self.model, self.cache = model, cache
        self.lengths = lengths
        """Tokens of each row in the cache."""

    @classmethod
    def start(cls, model: Transformer, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[TorchRows, Tensor]:
        """Run prompts; rows with room for `capacity` tokens, and the logits `(B, V)`, float32, after each prompt."""
        weight = model.embedding.weight
        cache = KVCache(model.config, len(prompts), capacity, weight.device, weight.dtype)
        rows = cls(model, cache, [len(prompt) for prompt in prompts])
        return rows, rows._prefill(prompts)

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Padding stands after a row's tokens, so nothing sees it; the row's answer overwrites it in the cache."""
        hidden = self.model.hidden(self._tensor(padded(prompts, 0)), cache=self.cache)
        last = self._tensor(self.lengths) - 1
        return self.model.head(hidden[torch.arange(len(prompts), device=last.device), last]).float()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row; logits `(B, V)`, float32."""
        # Rows of one length need no mask, and no positions of their own.
        even = all(length == self.cache.length for length in self.lengths)
        positions = None if even else self._tensor(self.lengths)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        hidden = self.model.hidden(self._tensor(tokens)[:, None], positions, cache=self.cache)
        return self.model.head(hidden[:, -1]).float()

    def hold(self, rows: Sequence[int]) -> None:
        """These rows do not grow in the next step: it overwrites their last token, as they are done."""
        for row in rows:
            self.lengths[row] -= 1

    def keep(self, rows: Sequence[int]) -> TorchRows:
        """New rows that go on from these ones, in this order."""
        cache = copy.copy(self.cache)
        cache.select(self._tensor(rows))
        lengths = [self.lengths[row] for row in rows]
        cache.length = max(lengths)
        return TorchRows(self.model, cache, lengths)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(list(values), device=self.model.embedding.weight.device)


def padded(sequences: Sequence[Sequence[int]], value: int) -> list[list[int]]:
    """All as long as the longest, filled on the right."""
    longest = max(len(sequence) for sequence in sequences)
    return [[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences]
