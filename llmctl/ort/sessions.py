"""Opening an ONNX Runtime session on the device that was asked for, and refusing to pretend.

onnxruntime-gpu lists the CUDA provider on machines without a GPU and then silently runs on the CPU. So the provider is
chosen by asking the driver, and what a session really got is read from the session.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path

import onnxruntime as ort

from llmctl.errors import InputError, MachineError, UsageError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DEVICES = ("auto", "cpu", "cuda")

_log = logging.getLogger(__name__)


def open_session(path: Path, device: str = "auto", threads: int = 0) -> ort.InferenceSession:
    """A session of the model file at `path`; `threads=0` takes all cores.

    `auto` is CUDA where it works, else the CPU, with a warning if there is a GPU that could not be used. Raises
    MachineError (7) if `cuda` is asked for and the session would run elsewhere, InputError (5) for a damaged file.
    """
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r}", hint=f"one of {', '.join(DEVICES)}")
    if threads < 0:
        raise UsageError(f"threads must not be negative, got {threads}")
    if not path.is_file():
        raise InputError(f"{path} is missing", hint="an ONNX bundle holds model.onnx; was the copy complete?")
    if device == "cpu" or not gpu_present():
        if device == "cuda":
            raise MachineError("no NVIDIA GPU: the driver reports no device", hint="use --device cpu")
        return _session(path, [CPU], threads)
    session = _session(path, [CUDA, CPU], threads)
    if provider(session) == CUDA:
        return session
    problem = "ONNX Runtime cannot use the GPU of this machine (its CUDA provider needs CUDA 13 and cuDNN 9)"
    if device == "cuda":
        raise MachineError(problem, hint="install onnxruntime-gpu's CUDA libraries, or use --device cpu")
    _log.warning("%s; running on the CPU", problem)
    return session


def provider(session: ort.InferenceSession) -> str:
    """The execution provider that the session really uses first."""
    return str(session.get_providers()[0])


def gpu_present() -> bool:
    """Whether the NVIDIA driver is there and reports a device; loads nothing of CUDA but the driver's own library."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _session(path: Path, providers: list[str], threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors come back as exceptions; ONNX Runtime's own lines on stderr would stand between the user's.
    options.log_severity_level = 4
    if CUDA in providers and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA libraries that pip installed beside torch
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reason = str(error).splitlines()[0].strip() if str(error) else type(error).__name__
        raise InputError(
            f"{_culprit(path, reason)} cannot be loaded: {reason}", hint="export the model again, or copy all its files"
        ) from error


def _culprit(path: Path, reason: str) -> Path:
    """The file to name: the external weights if the message is about them, else the model file."""
    data = path.with_name(path.name + ".data")
    return data if data.name in reason or "external" in reason.lower() else path
