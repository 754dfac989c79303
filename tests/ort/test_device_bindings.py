"""What is bound to a session on a device. A stand-in copies when something is bound, as ONNX Runtime does there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from llmctl.ort import OrtGenerator
from llmctl.ort import cache as caches
from llmctl.ort import slots as slots_module
from llmctl.ort.cache import InPlaceRows, Layout
from llmctl.ort.cache_memory import HostMemory
from llmctl.ort.slots import Slots

PROMPT = [3, 50, 7, 71, 90, 12, 40]
ON_DEVICE: set[int] = set()
"""Addresses of values that a device would hold."""


class DeviceBinding:
    """`IOBinding` of a session that wants its inputs on a device: those of the host are copied when they are bound."""

    def __init__(self, binding: ort.IOBinding) -> None:
        self.real = binding
        self.copies: dict[str, np.ndarray] = {}
        self.bind_ortvalue_output = binding.bind_ortvalue_output

    def bind_input(self, name: str, device: str, index: int, dtype: type, shape: tuple[int, ...], address: int) -> None:
        if device == "cpu":
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.copies[name] = np.frombuffer(ctypes.string_at(address, size), dtype).copy()
            address = self.copies[name].ctypes.data
        self.real.bind_input(name, "cpu", index, dtype, shape, address)

    def bind_ortvalue_input(self, name: str, value: ort.OrtValue) -> None:
        if value.data_ptr() not in ON_DEVICE:
            self.copies[name] = value.numpy().copy()
            value = ort.OrtValue.ortvalue_from_numpy(self.copies[name])
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str, *where) -> None:
        self.real.bind_output(name, "cpu", *where)


class DeviceSession:
    """A session of the CPU behind such bindings."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session

    def io_binding(self) -> DeviceBinding:
        return DeviceBinding(self.session.io_binding())

    def run_with_iobinding(self, binding: DeviceBinding) -> None:
        self.session.run_with_iobinding(binding.real)


@pytest.fixture
def on_device(generator: OrtGenerator, monkeypatch: pytest.MonkeyPatch) -> tuple[DeviceSession, Layout]:
    def value(array: np.ndarray, device: str = "cpu") -> ort.OrtValue:
        made = ort.OrtValue.ortvalue_from_numpy(array)
        if device != "cpu":
            ON_DEVICE.add(made.data_ptr())
        return made

    monkeypatch.setattr(caches, "_value", value)
    monkeypatch.setattr(slots_module, "open_memory", HostMemory)
    ON_DEVICE.clear()
    return DeviceSession(generator.session), replace(generator.layout, device="cuda")


def of_rows(session, layout: Layout) -> list[np.ndarray]:
    """Logits of a prompt and of steps behind it."""
    rows = InPlaceRows(session, layout, 1, 64)
    found = [rows.feed(0, PROMPT)]
    return found + [rows.step([token]).copy() for token in (5, 6, 7)]


def of_batches(session, layout: Layout) -> list[np.ndarray]:
    rows = InPlaceRows(session, layout, 2, 64)
    found = [rows.feed(0, PROMPT), rows.feed(1, PROMPT[:4])]
    found += [rows.step([token, token + 1]).copy() for token in (5, 6, 7)]
    return [*found, rows.keep([1]).step([8]).copy()]


def of_slots(session, layout: Layout) -> list[np.ndarray]:
    """Likewise with steps of two rows, of one, and of two again."""
    slots = Slots(session, layout, 2, 64)
    found = [slots.feed(0, np.array(PROMPT, np.int32)).copy(), slots.feed(1, np.array(PROMPT[:4], np.int32)).copy()]
    found += [slots.step(tokens).copy() for tokens in ([5, 6], [7, 8], [9], [10], [11, 12])]
    found.append(slots.feed(1, np.array([3, 4], np.int32), last=True).copy())
    slots.close()
    return found


@pytest.mark.parametrize("logits", [of_rows, of_batches, of_slots])
def test_every_step_binds_what_has_changed(
    generator: OrtGenerator, on_device: tuple[DeviceSession, Layout], logits: Callable
) -> None:
    for found, expected in zip(logits(*on_device), logits(generator.session, generator.layout), strict=True):
        np.testing.assert_array_equal(found, expected)
