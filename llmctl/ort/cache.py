"""Rows of tokens in flight and their keys and values: fed in chunks, then one token per step.

Two kinds of graph: with ONNX Runtime's GroupQueryAttention one buffer is bound as past and present, so a step writes
one slot and copies nothing (`InPlaceRows`); other graphs return past and new keys concatenated (`GrowingRows`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort

from llmctl.errors import InputError
from llmctl.ort.lazy_zeros import zeros
from llmctl.ort.sessions import CUDA, provider
from llmctl.ort.step_mask import StepMask

Float = type[np.float32] | type[np.float16]
_FLOATS: dict[str, Float] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_CACHES: dict[str, Float | type[np.int8]] = {**_FLOATS, "tensor(int8)": np.int8}
KEEP = "num_logits_to_keep"
"""An input with a default, 0: of how many last tokens logits are computed; 0: of all."""
_KNOWN = re.compile(
    r"(input_ids|attention_mask|position_ids|past_key_values\.\d+\.(decoder\.)?(key|value)|"
    r"encoder_attention_mask|encoder_hidden_states|past_key_values\.\d+\.encoder\.(key|value))\Z"
)


@dataclass(frozen=True)
class Layout:
    """The graph's inputs and outputs, as far as feeding it needs them."""

    layers: int
    kv_heads: int
    head_dim: int
    cache_dtype: Float | type[np.int8]
    """int8: the graph itself rounds and scales what it writes and reads; to the engine these are numbers as any."""
    logits_dtype: Float
    vocab_size: int
    position_ids: bool
    attention_mask: bool
    device: str
    """ "cpu" or "cuda": where the cache lives."""
    infix: str = ""
    """`.decoder` in the names of an encoder-decoder's cache, which holds its encoder's keys beside its own."""
    constants: tuple[str, ...] = ()
    """Inputs that stay the same from step to step: the keys, values and mask of what the encoder read."""
    keeps_last: bool = False
    """Whether the graph computes the logits of the last tokens alone when `num_logits_to_keep` says how many."""

    @property
    def past(self) -> list[str]:
        """Names of the cache's inputs, keys and values of layer after layer."""
        return self._names("past_key_values")

    @property
    def present(self) -> list[str]:
        """Names of the cache's outputs, in the order of `past`."""
        return self._names("present")

    def _names(self, what: str) -> list[str]:
        return [f"{what}.{i}{self.infix}.{kind}" for i in range(self.layers) for kind in ("key", "value")]


def read_layout(session: ort.InferenceSession, source: object) -> Layout:
    """Recognise a decoder with a KV cache, with an encoder or not; InputError, naming `source`, for other graphs."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    constants = tuple(name for name in inputs if "encoder" in name.replace("decoder", ""))
    infix = ".decoder" if constants else ""
    layers = sum(name.endswith(f"{infix}.key") and name not in constants for name in inputs)
    unknown = [name for name in inputs if not _KNOWN.match(name)]
    missing = {"input_ids", "logits"} - set(inputs) - set(outputs)
    if unknown or missing or not layers or f"present.{layers - 1}{infix}.value" not in outputs:
        what = f"unknown inputs {unknown}" if unknown else f"no {sorted(missing)}" if missing else "no KV cache"
        raise InputError(
            f"{source} is no decoder that generates text: {what}",
            hint="export a causal language model; task text-generation-with-past",
        )
    key, vocab = inputs[f"past_key_values.0{infix}.key"], outputs["logits"].shape[-1]
    shape = key.shape
    logits = outputs["logits"].type
    if key.type not in _CACHES or logits not in _FLOATS:
        raise InputError(
            f"{source} has a cache of {key.type} and logits of {logits}; floats or an int8 cache are known",
            hint="export the model again with `dtype: float32`",
        )
    if not all(isinstance(size, int) for size in (shape[1], shape[3], vocab)):
        raise InputError(f"{source} does not fix its heads, head width and vocabulary: {shape}, {vocab}")
    return Layout(
        layers=layers,
        kv_heads=shape[1],
        head_dim=shape[3],
        cache_dtype=_CACHES[key.type],
        logits_dtype=_FLOATS[logits],
        vocab_size=vocab,
        position_ids="position_ids" in inputs,
        attention_mask="attention_mask" in inputs,
        device="cuda" if provider(session) == CUDA else "cpu",
        infix=infix,
        constants=constants,
        keeps_last=any(value.name == KEEP and value.shape == [1] for value in session.get_overridable_initializers()),
    )


class Rows(Protocol):
    """Sequences in flight. Buffers returned by `step` are overwritten by the next call."""

    capacity: int
    """Most tokens a row can hold."""
    lengths: np.ndarray
    """Tokens in each row, `(B,)` int64."""

    def restart(self) -> None:
        """Empty all rows."""

    def feed(self, row: int, tokens: Sequence[int], last: bool = False) -> np.ndarray:
        """Append `tokens` to one row; logits `(len(tokens), V)` float32, or `(1, V)` of the last one alone."""

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row; logits `(B, V)` float32."""

    def hold(self, rows: Sequence[int]) -> None:
        """These rows do not grow in the next step; what it gives for them means nothing."""

    def keep(self, rows: Sequence[int]) -> Rows:
        """New rows that go on from these ones, in this order; these stay as they are."""


class InPlaceRows:
    """Rows over one preallocated cache: the same OrtValue is bound as `past_key_values.N` and `present.N`.

    A row's tokens fill its slots from 0 on, so rows may differ in length; what stands beyond a row's end is never seen.
    `constants` are the values of `layout.constants`, `adapter` those of `Adapters.feeds`, for all rows.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        layout: Layout,
        batch: int,
        capacity: int,
        constants: Mapping[str, np.ndarray] | None = None,
        adapter: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.session, self.layout, self.batch, self.capacity = session, layout, batch, capacity
        self.constants = dict(constants or {})
        self.adapter = dict(adapter or {})
        self.lengths = np.zeros(batch, np.int64)
        shape = (batch, layout.kv_heads, capacity, layout.head_dim)
        self.cache = [_value(zeros(shape, layout.cache_dtype), layout.device) for _ in layout.past]
        self._tokens = np.zeros((batch, 1), np.int64)
        self._positions = np.zeros((batch, 1), np.int64)
        self._mask = StepMask(batch, capacity)
        self._mask_shape = (0, 0)
        """Of the mask that the steps' binding has."""
        self._logits = np.zeros((batch, 1, layout.vocab_size), layout.logits_dtype)
        self._chosen, self._ends = self._tokens.reshape(-1).data, self.lengths.data
        self._places = self._positions.reshape(-1).data
        """Numbers that a step writes one by one: numpy's loops are not in the processor's caches behind a step."""
        self._step_values = {"input_ids": _value(self._tokens), "logits": _value(self._logits)}
        if layout.position_ids:
            self._step_values["position_ids"] = _value(self._positions)
        if layout.keeps_last:
            self._step_values[KEEP] = _value(np.zeros(1, np.int64))
        self._binding = session.io_binding()
        for name, array in {**self.constants, **self.adapter}.items():
            self._binding.bind_ortvalue_input(name, _value(array, layout.device))
        for past, present, value in zip(layout.past, layout.present, self.cache, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._bind_step()

    def restart(self) -> None:
        """Empty all rows; their slots need no clearing."""
        self.lengths[:] = 0

    def feed(self, row: int, tokens: Sequence[int], last: bool = False) -> np.ndarray:
        """Append `tokens` to `row`; logits `(len(tokens), V)` float32, equal whatever the other rows hold.

        `last`: `(1, V)`, of the last token alone, which is less work.
        """
        layout, count, start = self.layout, len(tokens), int(self.lengths[row])
        ids = np.asarray(tokens, np.int64)[None]
        kept = 1 if last and layout.keeps_last else count
        logits = np.empty((1, kept, layout.vocab_size), layout.logits_dtype)
        values = {"input_ids": _value(ids), "logits": _value(logits)}
        if layout.keeps_last:
            values[KEEP] = _value(np.array([kept]))
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
        return np.asarray(logits[0, -1:] if last else logits[0], np.float32)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row; logits `(B, V)` float32, valid until the next call."""
        ends = self._ends
        for row, token in enumerate(tokens):
            self._chosen[row], self._places[row] = token, ends[row]
            ends[row] += 1
        if self.layout.device != "cpu":
            self._bind_step()  # there a binding has copies of what it was given
        if self.layout.attention_mask:
            shape = self._mask.write(self.lengths)
            if shape != self._mask_shape:
                self._binding.bind_input("attention_mask", "cpu", 0, np.int64, shape, self._mask.address)
                self._mask_shape = shape
        self.session.run_with_iobinding(self._binding)
        logits = self._logits[:, 0]
        return logits if logits.dtype == np.float32 else logits.astype(np.float32)

    def hold(self, rows: Sequence[int]) -> None:
        """These rows do not grow in the next step: it overwrites their last token, as they are done."""
        self.lengths[list(rows)] -= 1

    def keep(self, rows: Sequence[int]) -> InPlaceRows:
        """New rows that go on from these ones, in this order."""
        constants = {name: array[list(rows)] for name, array in self.constants.items()}
        kept = InPlaceRows(self.session, self.layout, len(rows), self.capacity, constants, self.adapter)
        used = int(self.lengths[list(rows)].max())
        for i, value in enumerate(self.cache):
            part = np.zeros((len(rows), *value.shape()[1:]), self.layout.cache_dtype)
            part[:, :, :used] = value.numpy()[list(rows), :, :used]
            kept.replace(i, part)
        kept.lengths[:] = self.lengths[list(rows)]
        return kept

    def fill(self, cache: Sequence[np.ndarray], lengths: Sequence[int]) -> None:
        """Take over what another graph computed: `cache`, in the order of `Layout.past`, each `(B, KV, S, d)`."""
        for index, values in enumerate(cache):
            slots = np.zeros((*values.shape[:2], self.capacity, values.shape[3]), self.layout.cache_dtype)
            slots[:, :, : values.shape[2]] = values
            self.replace(index, slots)
        self.lengths[:] = lengths

    def replace(self, index: int, values: np.ndarray) -> None:
        """Put `values` in the place of cache tensor `index` (see `Layout.past`)."""
        self.cache[index] = _value(values, self.layout.device)
        self._binding.bind_ortvalue_input(self.layout.past[index], self.cache[index])
        self._binding.bind_ortvalue_output(self.layout.present[index], self.cache[index])

    def _bind_step(self) -> None:
        _bind(self._binding, self._step_values)
        self._mask_shape = (0, 0)

    def _row_binding(self, row: int) -> ort.IOBinding:
        """Views of one row's slots in every cache tensor, bound by address."""
        layout, binding = self.layout, self.session.io_binding()
        shape = (1, layout.kv_heads, self.capacity, layout.head_dim)
        offset = row * int(np.prod(shape)) * np.dtype(layout.cache_dtype).itemsize
        for past, present, value in zip(layout.past, layout.present, self.cache, strict=True):
            where = (layout.device, 0, layout.cache_dtype, shape, value.data_ptr() + offset)
            binding.bind_input(past, *where)
            binding.bind_output(present, *where)
        for name, array in self.adapter.items():
            binding.bind_ortvalue_input(name, _value(array, layout.device))
        return binding


class GrowingRows:
    """Rows of a graph that concatenates: each step's `present` is the next one's `past`, so all are of one length."""

    def __init__(
        self,
        session: ort.InferenceSession,
        layout: Layout,
        batch: int,
        capacity: int,
        constants: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.session, self.layout, self.batch, self.capacity = session, layout, batch, capacity
        self.constants = dict(constants or {})
        self._fixed = {name: _value(array, layout.device) for name, array in self.constants.items()}
        self.lengths = np.zeros(batch, np.int64)
        self.restart()

    def restart(self) -> None:
        """Empty the rows."""
        empty = np.zeros((self.batch, self.layout.kv_heads, 0, self.layout.head_dim), self.layout.cache_dtype)
        self.fill([empty] * len(self.layout.past), [0] * self.batch)

    def fill(self, cache: Sequence[np.ndarray], lengths: Sequence[int]) -> None:
        """Take over what another graph computed: `cache`, in the order of `Layout.past`, each `(B, KV, S, d)`."""
        self.cache = [_value(np.ascontiguousarray(values), self.layout.device) for values in cache]
        self.lengths[:] = lengths

    def feed(self, row: int, tokens: Sequence[int], last: bool = False) -> np.ndarray:
        """Append `tokens` to the only row; logits `(len(tokens), V)` float32, or `(1, V)` of the last one alone."""
        if row != 0 or self.batch != 1:
            raise IndexError(f"row {row} of {self.batch}: graphs that concatenate are fed all rows at once")
        return self._run(np.asarray(tokens, np.int64)[None], last)[0]  # type: ignore[no-any-return]

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to every row; logits `(B, V)` float32."""
        return self._run(np.asarray(tokens, np.int64)[:, None])[:, 0]

    def hold(self, rows: Sequence[int]) -> None:
        """All rows grow alike; what the next step gives for these means nothing."""

    def keep(self, rows: Sequence[int]) -> GrowingRows:
        """New rows that go on from these ones, in this order."""
        chosen = list(rows)
        constants = {name: array[chosen] for name, array in self.constants.items()}
        kept = GrowingRows(self.session, self.layout, len(chosen), self.capacity, constants)
        kept.fill([value.numpy()[chosen] for value in self.cache], self.lengths[chosen].tolist())
        return kept

    def _run(self, ids: np.ndarray, last: bool = False) -> np.ndarray:
        """Logits `(B, T, V)` of `ids (B, T)`, which follow what the cache holds; `last`: `(B, 1, V)`."""
        layout, start = self.layout, self.cache[0].shape()[2]
        end = start + ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        if layout.position_ids:
            binding.bind_cpu_input("position_ids", np.repeat(np.arange(start, end)[None], self.batch, 0))
        if layout.attention_mask:
            binding.bind_cpu_input("attention_mask", np.ones((self.batch, end), np.int64))
        if last and layout.keeps_last:
            binding.bind_ortvalue_input(KEEP, _value(np.ones(1, np.int64)))
        for name, value in [*zip(layout.past, self.cache, strict=True), *self._fixed.items()]:
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in layout.present:
            binding.bind_output(name, layout.device)
        self.session.run_with_iobinding(binding)
        logits, *self.cache = binding.get_outputs()
        self.lengths[:] = end
        found = logits.numpy()
        return np.asarray(found[:, -1:] if last else found, np.float32)


def _value(array: np.ndarray, device: str = "cpu") -> ort.OrtValue:
    """On the CPU a view of `array`, which it keeps alive; elsewhere a copy."""
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def _bind(binding: ort.IOBinding, values: dict[str, ort.OrtValue]) -> None:
    for name, value in values.items():
        (binding.bind_ortvalue_output if name == "logits" else binding.bind_ortvalue_input)(name, value)
