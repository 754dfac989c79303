"""Moves between slots. The device's are run against a stand-in for the driver that copies in the host's memory."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from llmctl.errors import MachineError
from llmctl.ort import cache_memory
from llmctl.ort.cache import Layout
from llmctl.ort.cache_memory import CacheMemory, DeviceMemory, HostMemory, open_memory
from llmctl.ort.cuda_driver import Copy2D, CudaDriver

LAYOUT = Layout(
    layers=2, kv_heads=3, head_dim=4, cache_dtype=np.float32, logits_dtype=np.float32, vocab_size=9,
    position_ids=False, attention_mask=True, device="cpu",
)  # fmt: skip
SLOTS, CAPACITY = 4, 8


def copies(found: ctypes.Array[Copy2D]) -> int:
    """cuMemcpy2D as its reference describes it: run y of the source goes to run y of the target."""
    what = found._obj
    for y in range(what.Height):
        ctypes.memmove(what.dstDevice + y * what.dstPitch, what.srcDevice + y * what.srcPitch, what.WidthInBytes)
    return 0


def library(**functions) -> SimpleNamespace:
    names = ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuCtxSynchronize")
    return SimpleNamespace(**{name: lambda *_: 0 for name in names}, cuMemcpy2DUnaligned_v2=copies, **functions)


def tensors(memory: CacheMemory) -> list[np.ndarray]:
    """Views of the memory behind the addresses."""
    size = SLOTS * 3 * CAPACITY * 4
    views = [(ctypes.c_float * size).from_address(address) for address in memory.addresses(0)]
    return [np.frombuffer(view, np.float32).reshape(SLOTS, 3, CAPACITY, 4) for view in views]


@pytest.fixture(params=["host", "device"])
def memory(request: pytest.FixtureRequest) -> CacheMemory:
    if request.param == "host":
        return HostMemory(LAYOUT, SLOTS, CAPACITY)
    return DeviceMemory(LAYOUT, SLOTS, CAPACITY, CudaDriver(library()))


@pytest.fixture
def filled(memory: CacheMemory) -> list[np.ndarray]:
    """Its tensors, all numbers different; and each one's copy."""
    arrays = tensors(memory)
    for index, array in enumerate(arrays):
        array[:] = np.arange(array.size).reshape(array.shape) + 1000 * index
    return arrays


def test_copy(memory: CacheMemory, filled: list[np.ndarray]) -> None:
    expected = [array.copy() for array in filled]
    for array in expected:
        array[3, :, 2:5] = array[1, :, 2:5]
    memory.copy(1, 3, 2, 5)
    memory.copy(0, 2, 4, 4)
    assert all(np.array_equal(*pair) for pair in zip(filled, expected, strict=True))


def test_exchange(memory: CacheMemory, filled: list[np.ndarray]) -> None:
    expected = [array.copy() for array in filled]
    for array in expected:
        array[[0, 2], :, :6] = array[[2, 0], :, :6]
    memory.exchange(0, 2, 6)
    assert all(np.array_equal(*pair) for pair in zip(filled, expected, strict=True))


def test_save_and_load(memory: CacheMemory, filled: list[np.ndarray]) -> None:
    before = [array.copy() for array in filled]
    saved = memory.save(1, 5)
    assert saved.shape == (4, 3, 5, 4)
    memory.load(2, saved, 3)
    for array, old in zip(filled, before, strict=True):
        assert np.array_equal(array[2, :, :3], old[1, :, :3])
        assert np.array_equal(array[2, :, 3:], old[2, :, 3:])
        assert np.array_equal(array[[0, 1, 3]], old[[0, 1, 3]])


def test_sizes(memory: CacheMemory) -> None:
    assert memory.bytes == 4 * SLOTS * 3 * CAPACITY * 4 * 4
    assert [b - a for a, b in zip(memory.addresses(0), memory.addresses(1), strict=True)] == [3 * CAPACITY * 4 * 4] * 4


def test_the_structure_is_that_of_the_driver() -> None:
    """Offsets of CUDA_MEMCPY2D on 64-bit platforms, where pointers are aligned to 8 bytes."""
    assert (Copy2D.srcHost.offset, Copy2D.srcDevice.offset, Copy2D.srcPitch.offset) == (24, 32, 48)
    assert (Copy2D.dstDevice.offset, Copy2D.dstPitch.offset, Copy2D.Height.offset) == (88, 104, 120)
    assert ctypes.sizeof(Copy2D) == 128


def test_an_error_of_the_driver_is_told() -> None:
    driver = CudaDriver(library())
    driver._cuda.cuMemcpy2DUnaligned_v2 = lambda *_: 700
    with pytest.raises(MachineError, match="error 700"):
        driver.copy(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_there_is_no_memory_for_is_said_in_figures(monkeypatch, device):
    def none(*_):
        raise MemoryError if device == "cpu" else RuntimeError("Failed to allocate memory")  # noqa: TRY301

    monkeypatch.setattr(cache_memory, "HostMemory" if device == "cpu" else "DeviceMemory", none)
    monkeypatch.setattr(cache_memory, "CudaDriver", lambda: None)
    with pytest.raises(MachineError, match=r"16 sequences of 1000000 tokens, 3\.1 GB") as caught:
        open_memory(replace(LAYOUT, device=device), 16, 1_000_000)
    assert caught.value.hint == "lower `slots` or `context`"
