"""Keys and values of many sequences in one preallocated cache, and the calls of the model that extend them.

Slots 0 to B - 1 are the first B rows of every cache tensor, so a decode step of B sequences is a batch of exactly
these rows, bound by address: nothing is gathered and nothing padded. Whoever schedules keeps the running sequences in
the first slots (`exchange`). A slot's contents are known token by token, whoever used it last, which is what a prefix
is matched against.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from llmctl.ort.adapter_rows import RowAdapters
from llmctl.ort.adapters import Adapters
from llmctl.ort.cache import KEEP, Layout
from llmctl.ort.cache_memory import CacheMemory, open_memory
from llmctl.ort.step_mask import StepMask


class Slots:
    """`count` sequences of up to `capacity` tokens each. Logits that a call returns are overwritten by the next one.

    On the CPU the memory is reserved, and pages of it come to be when they are first written: `memory_bytes` is the
    most it can become. On CUDA all of it is taken at once.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        layout: Layout,
        count: int,
        capacity: int,
        adapters: Adapters | None = None,
    ) -> None:
        self.session, self.layout, self.count, self.capacity = session, layout, count, capacity
        self.memory: CacheMemory = open_memory(layout, count, capacity)
        self.lengths = np.zeros(count, np.int64)
        """Tokens whose keys and values each slot holds, `(count,)`."""
        self.contents = np.zeros((count, capacity), np.int32)
        """These tokens."""
        self.adapters = np.zeros(count, np.int64)
        """The number of the adapter that computed what a slot holds, and computes what comes to it."""
        self._rows = None if adapters is None else RowAdapters(adapters)
        self._ids = np.zeros((count, 1), np.int64)
        self._positions = np.zeros((count, 1), np.int64)
        self._chosen, self._ends = self._ids.reshape(-1).data, self.lengths.data
        self._places, self._texts = self._positions.reshape(-1).data, self.contents.data
        """Numbers that a step writes one by one: numpy's loops are not in the processor's caches behind a step."""
        self._mask = StepMask(count, capacity)
        self._shapes: dict[int, tuple[int, int]] = {}
        """Of the mask that each step's binding has."""
        self._copied = layout.device != "cpu"
        """Whether what is bound from the host's memory is copied at that moment, and later writes are not seen."""
        self._ones = np.ones(capacity, np.int64)
        self._kept = np.zeros(1, np.int64)
        self._range = np.arange(capacity)
        self._logits = np.zeros((count, 1, layout.vocab_size), layout.logits_dtype)
        self._scratch = np.zeros((0, layout.vocab_size), layout.logits_dtype)
        self._steps: dict[int, ort.IOBinding] = {}
        self._feeds: dict[int, ort.IOBinding] = {}

    @property
    def memory_bytes(self) -> int:
        """Most bytes that the keys and values can take."""
        return self.memory.bytes

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each of the first `len(tokens)` slots; logits `(len(tokens), V)` float32."""
        count = len(tokens)
        binding = self._steps.get(count) or self._bind_step(count)
        ends = self._ends
        for row, token in enumerate(tokens):
            self._chosen[row], self._places[row] = token, ends[row]
            self._texts[row, ends[row]] = token
            ends[row] += 1
        if self.layout.attention_mask:
            shape = self._mask.write(self.lengths[:count])
            if self._copied or self._shapes.get(count) != shape:
                binding.bind_input("attention_mask", "cpu", 0, np.int64, shape, self._mask.address)
                self._shapes[count] = shape
        if self._copied:
            self._bind_tokens(binding, count)
        if self._rows is not None:
            self._rows.bind(binding, self.adapters[:count])
        self.session.run_with_iobinding(binding)
        logits = self._logits[:count, 0]
        return logits if logits.dtype == np.float32 else logits.astype(np.float32)

    def feed(self, slot: int, tokens: np.ndarray, last: bool = False) -> np.ndarray:
        """Append `tokens (T,)` to one slot; logits `(T, V)` float32, equal whatever the other slots hold.

        `last`: `(1, V)`, of the last token alone, which is less work.

        T may be any number that fits: a chunk of a prompt, or drafted tokens to be judged (what is refused of them is
        taken back by a smaller `lengths`).
        """
        layout, count, start = self.layout, len(tokens), int(self.lengths[slot])
        end = start + count
        binding = self._feeds.get(slot) or self._bind_feed(slot)
        kept = 1 if last and layout.keeps_last else count
        if len(self._scratch) < kept:
            self._scratch = np.zeros((kept, layout.vocab_size), layout.logits_dtype)
        ids = np.ascontiguousarray(tokens, np.int64)
        positions = self._range[start:end]
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, count), ids.ctypes.data)
        if layout.position_ids:
            binding.bind_input("position_ids", "cpu", 0, np.int64, (1, count), positions.ctypes.data)
        if layout.attention_mask:
            binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, end), self._ones.ctypes.data)
        if layout.keeps_last:
            self._kept[0] = kept
            binding.bind_input(KEEP, "cpu", 0, np.int64, (1,), self._kept.ctypes.data)
        shape = (1, kept, layout.vocab_size)
        binding.bind_output("logits", "cpu", 0, layout.logits_dtype, shape, self._scratch.ctypes.data)
        if self._rows is not None:
            self._rows.bind(binding, self.adapters[slot : slot + 1])
        self.session.run_with_iobinding(binding)
        self.contents[slot, start:end] = tokens
        self.lengths[slot] = end
        return np.asarray(self._scratch[kept - 1 : kept] if last else self._scratch[:kept], np.float32)

    def match(self, tokens: np.ndarray, adapter: int = 0) -> np.ndarray:
        """For each slot, how many of `tokens (T,)` it holds from its start on by this adapter, `(count,)` int64."""
        width = min(len(tokens), int(self.lengths.max()))
        if width == 0:
            return np.zeros(self.count, np.int64)
        differ = self.contents[:, :width] != tokens[:width]
        common = np.where(differ.any(axis=1), differ.argmax(axis=1), width)
        return np.where(self.adapters == adapter, np.minimum(common, self.lengths), 0)

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """Tokens `start` to `stop` of one slot go to another, which already holds those before and now ends there."""
        self.lengths[target] = min(int(self.lengths[target]), start)  # what is behind is lost, also if this fails
        self.memory.copy(source, target, start, stop)
        self.contents[target, start:stop] = self.contents[source, start:stop]
        self.lengths[target] = stop

    def exchange(self, one: int, other: int) -> None:
        """Two slots change places."""
        count = int(max(self.lengths[one], self.lengths[other]))
        if not self.lengths[one]:
            self.memory.copy(other, one, 0, count)
        elif not self.lengths[other]:
            self.memory.copy(one, other, 0, count)
        else:
            self.memory.exchange(one, other, count)
        both = [one, other]
        self.contents[both, :count] = self.contents[both[::-1], :count]
        self.adapters[both] = self.adapters[both[::-1]]
        self.lengths[both] = self.lengths[both[::-1]]

    def load(self, slot: int, tokens: np.ndarray, values: np.ndarray, stop: int) -> None:
        """A slot takes the first `stop` of `tokens`, with what `CacheMemory.save` gave for them."""
        self.memory.load(slot, values, stop)
        self.contents[slot, :stop] = tokens[:stop]
        self.lengths[slot] = stop

    def close(self) -> None:
        """Give the memory back."""
        self._steps.clear()
        self._shapes.clear()
        self._feeds.clear()
        if self._rows is not None:
            self._rows.clear()
        self.memory.close()

    def _bind_step(self, count: int) -> ort.IOBinding:
        """The binding of a step of `count` rows, kept: on the CPU a step seldom changes more than what is in memory."""
        layout = self.layout
        binding = self.session.io_binding()
        self._bind_tokens(binding, count)
        shape = (count, 1, layout.vocab_size)
        binding.bind_output("logits", "cpu", 0, layout.logits_dtype, shape, self._logits.ctypes.data)
        self._bind_cache(binding, 0, count)
        self._steps[count] = binding
        return binding

    def _bind_tokens(self, binding: ort.IOBinding, count: int) -> None:
        binding.bind_input("input_ids", "cpu", 0, np.int64, (count, 1), self._ids.ctypes.data)
        if self.layout.position_ids:
            binding.bind_input("position_ids", "cpu", 0, np.int64, (count, 1), self._positions.ctypes.data)

    def _bind_feed(self, slot: int) -> ort.IOBinding:
        binding = self.session.io_binding()
        self._bind_cache(binding, slot, 1)
        self._feeds[slot] = binding
        return binding

    def _bind_cache(self, binding: ort.IOBinding, first: int, count: int) -> None:
        """Rows `first` to `first + count` of every cache tensor as past and as present."""
        layout = self.layout
        shape = (count, layout.kv_heads, self.capacity, layout.head_dim)
        for past, present, address in zip(layout.past, layout.present, self.memory.addresses(first), strict=True):
            binding.bind_input(past, layout.device, 0, layout.cache_dtype, shape, address)
            binding.bind_output(present, layout.device, 0, layout.cache_dtype, shape, address)
