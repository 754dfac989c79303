"""Where keys and values lie, and how they move between slots: in the host's memory, or in that of a CUDA device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import onnxruntime as ort

from llmctl.errors import MachineError
from llmctl.ort.cache import Layout
from llmctl.ort.cuda_driver import CudaDriver
from llmctl.ort.lazy_zeros import zeros


class CacheMemory(Protocol):
    """One tensor `(slots, KV, capacity, d)` for the keys and one for the values of each layer."""

    bytes: int

    def addresses(self, slot: int) -> list[int]:
        """Where the slot's row begins in every tensor, in the order of `Layout.past`."""

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Tokens `start` to `stop` of one slot to another."""

    def exchange(self, one: int, other: int, stop: int) -> None:
        """The first `stop` tokens of two slots change places."""

    def save(self, slot: int, stop: int) -> np.ndarray:
        """The first `stop` tokens, `(tensors, KV, stop, d)`, in the host's memory."""

    def load(self, slot: int, saved: np.ndarray, stop: int) -> None:
        """Put the first `stop` tokens of what `save` gave into a slot."""

    def close(self) -> None:
        """Give the memory back."""


class HostMemory:
    """`CacheMemory` for sessions on the CPU."""

    def __init__(self, layout: Layout, slots: int, capacity: int) -> None:
        shape = (slots, layout.kv_heads, capacity, layout.head_dim)
        self._arrays = [zeros(shape, layout.cache_dtype) for _ in layout.past]
        self.bytes = sum(array.nbytes for array in self._arrays)

    def addresses(self, slot: int) -> list[int]:
        """See `CacheMemory`."""
        return [array.ctypes.data + slot * array.strides[0] for array in self._arrays]

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """See `CacheMemory`."""
        for array in self._arrays:
            array[target, :, start:stop] = array[source, :, start:stop]

    def exchange(self, one: int, other: int, stop: int) -> None:
        """See `CacheMemory`."""
        for array in self._arrays:
            kept = array[one, :, :stop].copy()
            array[one, :, :stop] = array[other, :, :stop]
            array[other, :, :stop] = kept

    def save(self, slot: int, stop: int) -> np.ndarray:
        """See `CacheMemory`."""
        return np.stack([array[slot, :, :stop] for array in self._arrays])

    def load(self, slot: int, saved: np.ndarray, stop: int) -> None:
        """See `CacheMemory`."""
        for array, values in zip(self._arrays, saved, strict=True):
            array[slot, :, :stop] = values[:, :stop]

    def close(self) -> None:
        """See `CacheMemory`."""
        self._arrays = []


class DeviceMemory:
    """`CacheMemory` for sessions on CUDA: the driver's own two-dimensional copies, as ONNX Runtime has none of parts.

    A slot's tokens are KV runs of `d` numbers each, one capacity apart, so one `cuMemcpy2D` moves them within a tensor,
    or between it and the host. `run_with_iobinding` returns when the session's stream is done, and every move here is
    waited for, so the two never overlap, though they are on different streams.
    """

    def __init__(self, layout: Layout, slots: int, capacity: int, driver: Driver) -> None:
        self._layout, self._capacity, self._driver = layout, capacity, driver
        self._size = np.dtype(layout.cache_dtype).itemsize
        shape = (slots, layout.kv_heads, capacity, layout.head_dim)
        # Zeros, as kernels may load a whole tile and weigh what is behind a row's end with 0: there must be no NaN.
        zeros = (np.zeros(shape, layout.cache_dtype) for _ in layout.past)
        self._values = [ort.OrtValue.ortvalue_from_numpy(array, layout.device, 0) for array in zeros]
        self._row = layout.kv_heads * capacity * layout.head_dim * self._size
        self.bytes = slots * self._row * len(self._values)

    def addresses(self, slot: int) -> list[int]:
        """See `CacheMemory`."""
        return [value.data_ptr() + slot * self._row for value in self._values]

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """See `CacheMemory`."""
        self._move(zip(self.addresses(source), self.addresses(target), strict=True), start, stop)

    def exchange(self, one: int, other: int, stop: int) -> None:
        """See `CacheMemory`. By way of the host: a second copy on the device would need memory for it."""
        kept = self.save(one, stop)
        self.copy(other, one, 0, stop)
        self.load(other, kept, stop)

    def save(self, slot: int, stop: int) -> np.ndarray:
        """See `CacheMemory`."""
        layout = self._layout
        saved = np.empty((len(self._values), layout.kv_heads, stop, layout.head_dim), layout.cache_dtype)
        for address, part in zip(self.addresses(slot), saved, strict=True):
            self._driver.copy(address, self._pitch, part.ctypes.data, part.strides[0], part.strides[0], len(part))
        self._driver.wait()
        return saved

    def load(self, slot: int, saved: np.ndarray, stop: int) -> None:
        """See `CacheMemory`."""
        width = stop * self._layout.head_dim * self._size
        for address, part in zip(self.addresses(slot), saved, strict=True):
            self._driver.copy(part.ctypes.data, part.strides[0], address, self._pitch, width, len(part))
        self._driver.wait()

    def close(self) -> None:
        """See `CacheMemory`."""
        self._values = []

    @property
    def _pitch(self) -> int:
        return self._capacity * self._layout.head_dim * self._size

    def _move(self, pairs: Iterable[tuple[int, int]], start: int, stop: int) -> None:
        token = self._layout.head_dim * self._size
        for source, target in pairs:
            offset, width = start * token, (stop - start) * token
            if width:
                heads = self._layout.kv_heads
                self._driver.copy(source + offset, self._pitch, target + offset, self._pitch, width, heads)
        self._driver.wait()


class Driver(Protocol):
    """What moves bytes on a device, or to and from it."""

    def copy(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, height: int) -> None:
        """`height` runs of `width` bytes, a pitch apart on either side."""

    def wait(self) -> None:
        """Return when all copies are done."""


def token_bytes(layout: Layout) -> int:
    """Bytes that one token's keys and values take in all layers."""
    width = layout.kv_heads * layout.head_dim * np.dtype(layout.cache_dtype).itemsize
    return len(layout.past) * width


def open_memory(layout: Layout, slots: int, capacity: int) -> CacheMemory:
    """Memory for the cache where the session of `layout` computes. MachineError where there is not as much."""
    try:
        if layout.device == "cuda":
            return DeviceMemory(layout, slots, capacity, CudaDriver())
        return HostMemory(layout, slots, capacity)
    except (MemoryError, RuntimeError) as error:  # of the host, and of ONNX Runtime on CUDA
        size = slots * capacity * token_bytes(layout) / 1e9
        raise MachineError(
            f"no memory for the keys and values of {slots} sequences of {capacity} tokens, {size:.1f} GB",
            hint="lower `slots` or `context`",
        ) from error
