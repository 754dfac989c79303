"""Where keys and values lie, and how they move between slots: in the host's memory, or in that of a CUDA device."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from llmctl.ort.cache import Layout


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
        # calloc: the kernel gives pages when they are first written, so slots that are never used cost nothing.
        self._arrays = [np.zeros(shape, layout.cache_dtype) for _ in layout.past]
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


def token_bytes(layout: Layout) -> int:
    """Bytes that one token's keys and values take in all layers."""
    width = layout.kv_heads * layout.head_dim * np.dtype(layout.cache_dtype).itemsize
    return len(layout.past) * width


def open_memory(layout: Layout, slots: int, capacity: int) -> CacheMemory:
    """Memory for the cache where the session of `layout` computes."""
    return HostMemory(layout, slots, capacity)
