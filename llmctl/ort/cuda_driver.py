"""Copies by the NVIDIA driver, called through its C library: strided parts of tensors that ONNX Runtime holds.

Structures and functions are those of the CUDA driver API reference, "Memory Management" and "Primary Context
Management". Addresses are unified, so the driver tells by itself which side is the host's.
"""

from __future__ import annotations

import ctypes
import sys

from llmctl.errors import MachineError

_UNIFIED = 4
"""CU_MEMORYTYPE_UNIFIED."""


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("srcXInBytes", ctypes.c_size_t),
        ("srcY", ctypes.c_size_t),
        ("srcMemoryType", ctypes.c_int),
        ("srcHost", ctypes.c_void_p),
        ("srcDevice", ctypes.c_uint64),
        ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t),
        ("dstY", ctypes.c_size_t),
        ("dstMemoryType", ctypes.c_int),
        ("dstHost", ctypes.c_void_p),
        ("dstDevice", ctypes.c_uint64),
        ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    )


class CudaDriver:
    """See `llmctl.ort.cache_memory.Driver`. Device 0, in its primary context, which ONNX Runtime computes in too."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._cuda = library or ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        device, self._context = ctypes.c_int(0), ctypes.c_void_p(0)
        self._check(self._cuda.cuInit(0))
        self._check(self._cuda.cuDeviceGet(ctypes.byref(device), 0))
        self._check(self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device))

    def copy(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, height: int) -> None:
        """See `Driver`."""
        # The calling thread's own context: a server steps its engine from a thread of its own.
        self._check(self._cuda.cuCtxSetCurrent(self._context))
        what = Copy2D(
            srcMemoryType=_UNIFIED,
            srcDevice=source,
            srcPitch=source_pitch,
            dstMemoryType=_UNIFIED,
            dstDevice=target,
            dstPitch=target_pitch,
            WidthInBytes=width,
            Height=height,
        )
        # The unaligned kind: rows of a cache are pitched by its capacity, not by what the device likes best.
        self._check(self._cuda.cuMemcpy2DUnaligned_v2(ctypes.byref(what)))

    def wait(self) -> None:
        """See `Driver`."""
        self._check(self._cuda.cuCtxSetCurrent(self._context))
        self._check(self._cuda.cuCtxSynchronize())

    def _check(self, code: int) -> None:
        if code:
            raise MachineError(
                f"the NVIDIA driver could not move keys and values: error {code}", hint="lower `slots` or `context`"
            )
