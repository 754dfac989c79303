"""Rows of tokens in flight in the torch model, and what it remembers of them: the `Rows` of `llmctl.decoding`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmctl.nn.attention import PADDING, KVCache, Memory
from llmctl.nn.transformer import Transformer


class TorchRows:
    """Rows over one preallocated cache; they may differ in length."""

    def __init__(self, model: Transformer, cache: KVCache, lengths: list[int], memory: Memory | None = None) -> None:
        self.model, self.cache, self.memory = model, cache, memory
        self.lengths = lengths
        """Tokens of each row in the cache."""

    @classmethod
    def start(cls, model: Transformer, prompts: Sequence[Sequence[int]], limit: int) -> tuple[TorchRows, Tensor]:
        """Run prompts; rows with room for `limit` tokens more, and the logits `(B, V)`, float32, after each prompt.

        An encoder-decoder reads the prompts, and its rows begin with the start token.
        """
        config, weight, memory = model.config, model.embedding.weight, None
        if config.decoder_start_id is not None:
            memory = remember(model, prompts)
            prompts = [[config.decoder_start_id]] * len(prompts)
        lengths = [len(prompt) for prompt in prompts]
        cache = KVCache(config, len(prompts), max(lengths) + limit, weight.device, weight.dtype)
        rows = cls(model, cache, lengths, memory)
        return rows, rows._prefill(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Padding stands after a row's tokens, so nothing sees it; the row's answer overwrites it in the cache."""
        with inference(self.model):
            hidden = self.model.hidden(self._tensor(padded(prompts)), cache=self.cache, memory=self.memory)
            last = self._tensor(self.lengths) - 1
            return self.model.head(hidden[torch.arange(len(prompts), device=last.device), last]).float()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row; logits `(B, V)`, float32."""
        # Rows of one length need no mask, and no positions of their own.
        even = all(length == self.cache.length for length in self.lengths)
        positions = None if even else self._tensor(self.lengths)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        with inference(self.model):
            column = self._tensor(tokens)[:, None]
            hidden = self.model.hidden(column, positions, cache=self.cache, memory=self.memory)
            return self.model.head(hidden[:, -1]).float()

    def hold(self, rows: Sequence[int]) -> None:
        """These rows do not grow in the next step: it overwrites their last token, as they are done."""
        for row in rows:
            self.lengths[row] -= 1

    def keep(self, rows: Sequence[int]) -> TorchRows:
        """New rows that go on from these ones, in this order."""
        # Selecting replaces the tensors of a cache, so a shallow copy leaves these rows as they are.
        index, cache, memory = self._tensor(rows), copy.copy(self.cache), copy.copy(self.memory)
        lengths = [self.lengths[row] for row in rows]
        cache.select(index)
        cache.length = max(lengths)
        if memory is not None:
            memory.select(index)
        return TorchRows(self.model, cache, lengths, memory)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(list(values), device=self.model.embedding.weight.device)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; a model in training goes on training afterwards."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def remember(model: Transformer, sources: Sequence[Sequence[int]]) -> Memory:
    """What the encoder leaves of `sources`, which may differ in length."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(source) for source in sources], device=device)
    tokens = torch.tensor(padded(sources), device=device)
    real = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    documents = None if bool(real.all()) else torch.where(real, 0, PADDING)
    with inference(model):
        return model.remember(tokens, documents)


def padded(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """All as long as the longest, filled on the right with an id that is nowhere seen."""
    longest = max(len(sequence) for sequence in sequences)
    return [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
