"""Rows of tokens in flight and their keys and values: fed in chunks, then one token per step.

Two kinds of graph: with ONNX Runtime's GroupQueryAttention one buffer is bound as past and present, so a step writes
one slot and copies nothing (`InPlaceRows`); other graphs return past and new keys concatenated (`GrowingRow`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort

from llmctl import decoding
from llmctl.errors import InputError
from llmctl.ort.sessions import CUDA, provider

_DTYPES: dict[str, type[np.float32] | type[np.float16]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_KNOWN = re.compile(r"input_ids|attention_mask|position_ids|past_key_values\.\d+\.(key|value)\Z")


@dataclass(frozen=True)
class Layout:
    """The graph's inputs and outputs, as far as feeding it needs them."""

    layers: int
    kv_heads: int
    head_dim: int
    cache_dtype: type[np.float32] | type[np.float16]
    logits_dtype: type[np.float32] | type[np.float16]
    vocab_size: int
    position_ids: bool
    attention_mask: bool
    device: str
    """ "cpu" or "cuda": where the cache lives."""

    @property
    def past(self) -> list[str]:
        """Names of the cache's inputs, keys and values of layer after layer."""
        return [f"past_key_values.{i}.{kind}" for i in range(self.layers) for kind in ("key", "value")]

    @property
    def present(self) -> list[str]:
        """Names of the cache's outputs, in the order of `past`."""
        return [f"present.{i}.{kind}" for i in range(self.layers) for kind in ("key", "value")]


def read_layout(session: ort.InferenceSession, source: object) -> Layout:
    """Recognise a decoder-only graph with a KV cache; InputError, naming `source`, for any other graph."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    layers = sum(name.endswith(".key") for name in inputs)
    unknown = [name for name in inputs if not _KNOWN.match(name)]
    missing = {"input_ids", "logits"} - set(inputs) - set(outputs)
    if unknown or missing or not layers or f"present.{layers - 1}.value" not in outputs:
        what = f"unknown inputs {unknown}" if unknown else f"no {sorted(missing)}" if missing else "no KV cache"
        raise InputError(
            f"{source} is no decoder that generates text: {what}",
            hint="export a causal language model; task text-generation-with-past",
        )
    key, vocab = inputs["past_key_values.0.key"], outputs["logits"].shape[-1]
    shape = key.shape
    if key.type not in _DTYPES or outputs["logits"].type not in _DTYPES:
        raise InputError(f"{source} has a cache of {key.type} and logits of {outputs['logits'].type}, not of floats")
    if not all(isinstance(size, int) for size in (shape[1], shape[3], vocab)):
        raise InputError(f"{source} does not fix its heads, head width and vocabulary: {shape}, {vocab}")
    return Layout(
        layers=layers,
        kv_heads=shape[1],
        head_dim=shape[3],
        cache_dtype=_DTYPES[key.type],
        logits_dtype=_DTYPES[outputs["logits"].type],
        vocab_size=vocab,
        position_ids="position_ids" in inputs,
        attention_mask="attention_mask" in inputs,
        device="cuda" if provider(session) == CUDA else "cpu",
    )


class Rows(Protocol):
    """Sequences in flight. Buffers returned by `step` are overwritten by the next call."""

    capacity: int
    """Most tokens a row can hold."""
    lengths: np.ndarray
    """Tokens in each row, `(B,)` int64."""

    def restart(self) -> None:
        """Empty all rows."""

    def feed(self, row: int, tokens: Sequence[int]) -> np.ndarray:
        """Append `tokens` to one row; logits `(len(tokens), V)` float32."""

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row; logits `(B, V)` float32."""

    def keep(self, rows: Sequence[int]) -> decoding.Rows:
        """New rows that go on from these ones, in this order; these stay as they are."""


class InPlaceRows:
    """Rows over one preallocated cache: the same OrtValue is bound as `past_key_values.N` and `present.N`.

    A row's tokens fill its slots from 0 on, so rows may differ in length; what stands beyond a row's end is never seen.
    """

    def __init__(self, session: ort.InferenceSession, layout: Layout, batch: int, capacity: int) -> None:
        self.session, self.layout, self.batch, self.capacity = session, layout, batch, capacity
        self.lengths = np.zeros(batch, np.int64)
        shape = (batch, layout.kv_heads, capacity, layout.head_dim)
        # Zeroed pages are not touched until written, so a large capacity costs a short chat nothing.
        self.cache = [_value(np.zeros(shape, layout.cache_dtype), layout.device) for _ in layout.past]
        self._tokens = np.zeros((batch, 1), np.int64)
        self._positions = np.zeros((batch, 1), np.int64)
        self._mask = np.ones(batch * capacity, np.int64)
        self._logits = np.zeros((batch, 1, layout.vocab_size), layout.logits_dtype)
        self._step_values = {"input_ids": _value(self._tokens), "logits": _value(self._logits)}
        if layout.position_ids:
            self._step_values["position_ids"] = _value(self._positions)
        self._binding = session.io_binding()
        for past, present, value in zip(layout.past, layout.present, self.cache, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._bind_step()

    def restart(self) -> None:
        """Empty all rows; their slots need no clearing."""
        self.lengths[:] = 0

    def feed(self, row: int, tokens: Sequence[int]) -> np.ndarray:
        """Append `tokens` to `row`; logits `(len(tokens), V)` float32, equal whatever the other rows hold."""
        layout, count, start = self.layout, len(tokens), int(self.lengths[row])
        ids = np.asarray(tokens, np.int64)[None]
        logits = np.empty((1, count, layout.vocab_size), layout.logits_dtype)
        values = {"input_ids": _value(ids), "logits": _value(logits)}
        if layout.position_ids:
            values["position_ids"] = _value(np.arange(start, start + count)[None])
        ones = np.ones((1, start + count), np.int64)
        binding = self._binding if self.batch == 1 else self._row_binding(row)
        _bind(binding, values)
        if layout.attention_mask:
            binding.bind_ortvalue_input("attention_mask", _value(ones))
        self.session.run_with_iobinding(binding)
        self.lengths[row] += count
        if self.batch == 1:
            self._bind_step()
        return np.asarray(logits[0], np.float32)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row; logits `(B, V)` float32, valid until the next call."""
        self._tokens[:, 0] = tokens
        self._positions[:, 0] = self.lengths
        self.lengths += 1
        longest = int(self.lengths[0]) if self.batch == 1 else self._mask_rows()
        if self.layout.attention_mask:
            # The mask grows by one each step: the same buffer under a new shape.
            self._binding.bind_input(
                "attention_mask", "cpu", 0, np.int64, (self.batch, longest), self._mask.ctypes.data
            )
        self.session.run_with_iobinding(self._binding)
        return np.asarray(self._logits[:, 0], np.float32)

    def hold(self, rows: Sequence[int]) -> None:
        """These rows do not grow in the next step: it overwrites their last token, as they are done."""
        self.lengths[list(rows)] -= 1

    def keep(self, rows: Sequence[int]) -> InPlaceRows:
        """New rows that go on from these ones, in this order."""
        kept = InPlaceRows(self.session, self.layout, len(rows), self.capacity)
        used = int(self.lengths[list(rows)].max())
        for i, value in enumerate(self.cache):
            part = np.zeros((len(rows), *value.shape()[1:]), self.layout.cache_dtype)
            part[:, :, :used] = value.numpy()[list(rows), :, :used]
            kept.replace(i, part)
        kept.lengths[:] = self.lengths[list(rows)]
        return kept

    def replace(self, index: int, values: np.ndarray) -> None:
        """Put `values` in the place of cache tensor `index` (see `Layout.past`)."""
        self.cache[index] = _value(values, self.layout.device)
        self._binding.bind_ortvalue_input(self.layout.past[index], self.cache[index])
        self._binding.bind_ortvalue_output(self.layout.present[index], self.cache[index])

    def _mask_rows(self) -> int:
        """Write the mask of rows that differ in length, `(B, longest)`; returns the longest length."""
        longest = int(self.lengths.max())
        mask = self._mask[: self.batch * longest].reshape(self.batch, longest)
        np.less(np.arange(longest), self.lengths[:, None], out=mask, casting="unsafe")
        return longest

    def _bind_step(self) -> None:
        _bind(self._binding, self._step_values)

    def _row_binding(self, row: int) -> ort.IOBinding:
        """Views of one row's slots in every cache tensor, bound by address."""
        layout, binding = self.layout, self.session.io_binding()
        shape = (1, layout.kv_heads, self.capacity, layout.head_dim)
        offset = row * int(np.prod(shape)) * np.dtype(layout.cache_dtype).itemsize
        for past, present, value in zip(layout.past, layout.present, self.cache, strict=True):
            where = (layout.device, 0, layout.cache_dtype, shape, value.data_ptr() + offset)
            binding.bind_input(past, *where)
            binding.bind_output(present, *where)
        return binding


class GrowingRow:
    """One row of a graph that concatenates: each step's `present` is the next one's `past`, and no value is changed."""

    def __init__(self, session: ort.InferenceSession, layout: Layout, capacity: int) -> None:
        self.session, self.layout, self.capacity = session, layout, capacity
        self.lengths = np.zeros(1, np.int64)
        self._empty = np.zeros((1, layout.kv_heads, 0, layout.head_dim), layout.cache_dtype)
        self.restart()

    def restart(self) -> None:
        """Empty the row."""
        self.lengths[:] = 0
        self.cache = [_value(self._empty, self.layout.device) for _ in self.layout.past]

    def feed(self, row: int, tokens: Sequence[int]) -> np.ndarray:
        """Append `tokens`; logits `(len(tokens), V)` float32. `row` is 0."""
        if row != 0:
            raise IndexError(f"row {row} of 1")
        layout, start, end = self.layout, int(self.lengths[0]), int(self.lengths[0]) + len(tokens)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.asarray(tokens, np.int64)[None])
        if layout.position_ids:
            binding.bind_cpu_input("position_ids", np.arange(start, end)[None])
        if layout.attention_mask:
            binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        for name, value in zip(layout.past, self.cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in layout.present:
            binding.bind_output(name, layout.device)
        self.session.run_with_iobinding(binding)
        logits, *self.cache = binding.get_outputs()
        self.lengths[0] = end
        return np.asarray(logits.numpy()[0], np.float32)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token; logits `(1, V)` float32."""
        return self.feed(0, tokens)

    def keep(self, rows: Sequence[int]) -> SplitRows:
        """Rows that go on from this one, as many as `rows` names it."""
        return SplitRows([self]).keep(rows)


class SplitRows:
    """Rows of a graph that concatenates, each run by itself, because such a graph takes rows of one length only."""

    def __init__(self, parts: list[GrowingRow]) -> None:
        self.parts = parts
        self._held: frozenset[int] = frozenset()

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row that is not held; logits `(B, V)` float32."""
        logits = np.zeros((len(self.parts), self.parts[0].layout.vocab_size), np.float32)
        for i, (part, token) in enumerate(zip(self.parts, tokens, strict=True)):
            if i not in self._held:
                logits[i] = part.step([token])[0]
        self._held = frozenset()
        return logits

    def hold(self, rows: Sequence[int]) -> None:
        """The next step leaves these rows out."""
        self._held = frozenset(rows)

    def keep(self, rows: Sequence[int]) -> SplitRows:
        """New rows that go on from these ones; the cache so far is shared, as a step makes a new one."""
        parts = [copy.copy(self.parts[row]) for row in rows]
        for part in parts:
            part.lengths = part.lengths.copy()
        return SplitRows(parts)


def _value(array: np.ndarray, device: str = "cpu") -> ort.OrtValue:
    """On the CPU a view of `array`, which it keeps alive; elsewhere a copy."""
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def _bind(binding: ort.IOBinding, values: dict[str, ort.OrtValue]) -> None:
    for name, value in values.items():
        (binding.bind_ortvalue_output if name == "logits" else binding.bind_ortvalue_input)(name, value)
