"""Generation with models of transformers: `Rows` over transformers' own cache, and the generator that uses them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llmctl.generator import prompt_room
from llmctl.nn.foreign import ForeignModel
from llmctl.nn.transformer import Transformer
from llmctl.train.generate import CACHE_BYTES, MAX_ROWS, TorchGenerator
from llmctl.train.rows import inference


class ForeignRows:
    """Rows of unequal length, padded on the left as transformers' `generate` does.

    A family without a cache of keys and values (recurrent ones) computes each row anew and alone at every step.
    """

    def __init__(self, model: ForeignModel, ids: list[list[int]], mask: Tensor, past: Any) -> None:
        self.model, self.ids, self.mask, self.past = model, ids, mask, past

    @classmethod
    def start(cls, model: ForeignModel, prompts: Sequence[Sequence[int]]) -> tuple[ForeignRows, Tensor]:
        """Run prompts; the rows, and the logits `(B, V)`, float32, after each prompt."""
        longest = max(len(prompt) for prompt in prompts)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.net.device)
        rows = cls(model, [list(prompt) for prompt in prompts], mask, None)
        return rows, rows._prefill()

    def _prefill(self) -> Tensor:
        width = self.mask.shape[1]
        tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in self.ids], device=self.mask.device)
        out = self._run(tokens, self.mask, None)
        self.past = getattr(out, "past_key_values", None)
        if self.past is None:
            return self._alone()
        return out.logits[:, -1].float()  # type: ignore[no-any-return]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row; logits `(B, V)`, float32."""
        for ids, token in zip(self.ids, tokens, strict=True):
            ids.append(token)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.ids), 1)], dim=1)
        if self.past is None:
            return self._alone()
        if self.mask.shape[1] - 1 == rope_switch(self.model):
            return self._prefill()  # from here on every rotation is another one
        column = torch.tensor(tokens, device=self.mask.device)[:, None]
        return self._run(column, self.mask, self.past).logits[:, -1].float()  # type: ignore[no-any-return]

    def hold(self, rows: Sequence[int]) -> None:
        """Nothing: what these rows are given next means nothing, and no other row sees it."""

    def keep(self, rows: Sequence[int]) -> ForeignRows:
        """New rows that go on from these ones, in this order."""
        index = torch.tensor(list(rows), device=self.mask.device)
        past = copy.copy(self.past)
        if past is not None:
            past.layers = [copy.copy(layer) for layer in past.layers]  # selecting replaces the tensors of a layer
            past.batch_select_indices(index)
        return ForeignRows(self.model, [list(self.ids[row]) for row in rows], self.mask[index], past)

    def _run(self, tokens: Tensor, mask: Tensor, past: Any) -> Any:
        positions = (mask.cumsum(1) - 1).clamp(0, self.model.config.context - 1)[:, -tokens.shape[1] :]
        with inference(self.model):
            return self.model.run_cached(tokens, mask, positions, past)

    def _alone(self) -> Tensor:
        # A row that is done may have outgrown the context; what it gives means nothing.
        context = self.model.config.context
        rows = [torch.tensor([ids[-context:]], device=self.mask.device) for ids in self.ids]
        with inference(self.model):
            return torch.cat([self.model(row)[:, -1].float() for row in rows])


class ForeignGenerator(TorchGenerator):
    """Implements `llmctl.generator.Generator` with a model of transformers and its cache."""

    def __init__(self, model: ForeignModel, eos_ids: Iterable[int] | None = None) -> None:
        self.model = cast(Transformer, model)  # what is used of it beyond ForeignModel is replaced below
        self._model = model
        self.eos_ids = frozenset(model.config.eos_ids if eos_ids is None else eos_ids)
        self.context_length = model.config.context
        self.vocab_size = model.config.vocab_size
        self.encoder_decoder = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.net.device  # type: ignore[no-any-return]

    @property
    def backend(self) -> str:
        """`transformers gpt_neox cpu float32`."""
        dtype = str(self._model.net.dtype).removeprefix("torch.")
        return f"transformers {self._model.config.arch} {self.device} {dtype}"

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens that may follow; see `Generator.room`."""
        room = prompt_room(prompt, self.context_length, False)
        self._check_ids(prompt)
        return room

    def _logits(self, tokens: Sequence[int | None], memory: Any = None) -> np.ndarray:
        with inference(self._model):
            row = torch.tensor([list(tokens)], device=self.device)
            return self._model(row)[0].float().cpu().numpy()  # type: ignore[no-any-return]

    def _start(self, prompts: Sequence[Sequence[int]], limit: int) -> tuple[Any, Tensor]:
        return ForeignRows.start(self._model, prompts)

    def _rows(self, capacity: int) -> int:
        config = self._model.config
        switch = rope_switch(self._model)
        if switch and capacity > switch:
            return 1  # the rotation is that of the longest row, for all
        element: int = self._model.net.dtype.itemsize
        per_row = 2 * config.layers * config.kv_heads * config.head_dim * capacity * element
        return max(1, min(MAX_ROWS, CACHE_BYTES // per_row))


def rope_switch(model: ForeignModel) -> int:
    """The length beyond which LongRoPE (2402.13753) turns every position by its other factors; 0 without it."""
    config: Any = model.net.config
    scaling: Any = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type")) != "longrope":
        return 0
    length = getattr(config, "original_max_position_embeddings", None)
    return int(length or scaling.get("original_max_position_embeddings") or 0)
