"""Opening an ONNX Runtime session on the device that was asked for, and refusing to pretend.

onnxruntime-gpu lists the CUDA provider on machines without a GPU and then silently runs on the CPU. So the provider is
chosen by asking the driver, and what a session really got is read from the session.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
from pathlib import Path

import onnxruntime as ort

from llmctl.errors import InputError, MachineError, UsageError
from llmctl.ort.huge_pages import in_huge_pages

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DEVICES = ("auto", "cpu", "cuda")

SPIN = "LLMCTL_SPIN_US"
"""Environment variable: microseconds for which threads without work look for some before they sleep; 0: not at all."""

_log = logging.getLogger(__name__)


def open_session(path: Path, device: str = "auto", threads: int = 0) -> ort.InferenceSession:
    """A session of the model file at `path`; `threads=0` takes `cpu_threads()`.

    `auto` is CUDA where it works, else the CPU, with a warning if there is a GPU that could not be used. Raises
    MachineError (7) if `cuda` is asked for and the session would run elsewhere, InputError (5) for a damaged file.
    """
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r}", hint=f"one of {', '.join(DEVICES)}")
    if threads < 0:
        raise UsageError(f"threads must not be negative, got {threads}", hint="0 chooses")
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


def cpu_threads() -> tuple[int, str]:
    """How many threads compute by default, and why.

    One for each physical core that the process may run on (its affinity mask), for decoding waits for memory and two
    threads of one core wait for the same; no more than the container's share of CPU time (cgroup), since threads beyond
    it are stopped in the middle of a product that the others wait for.
    """
    allowed = _allowed()
    cores, why = _physical(allowed), "physical cores"
    if len(allowed) < (os.cpu_count() or 1):
        why = "physical cores of the affinity mask"
    share = _cgroup_share()
    if share is not None and share < cores:
        return max(1, math.floor(share)), f"the cgroup's limit of {share:g} CPUs"
    return cores, why


def _allowed() -> list[int]:
    """Numbers of the logical CPUs that the process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _physical(cpus: list[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many physical cores `cpus` are part of; every CPU is one where the system does not say (macOS, Windows)."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def _cgroup_share(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that the process's cgroup, or one around it, may use; None without a limit.

    Version 2 (`cpu.max`: quota and period, for the group and each of its parents) and version 1 (`cpu.cfs_quota_us`).
    """
    shares = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, place = line.split(":", 2)
        inside = Path(place.lstrip("/"))
        for group in (inside, *inside.parents):
            if not controllers:
                shares.append(_ratio(root / group / "cpu.max"))
            elif "cpu" in controllers.split(","):
                for base in (root / "cpu", root / controllers):
                    shares.append(_ratio(base / group / "cpu.cfs_quota_us", base / group / "cpu.cfs_period_us"))
    return min((share for share in shares if share is not None), default=None)


def _ratio(*files: Path) -> float | None:
    """Quota over period, read from one file or two."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def spin_us() -> int | None:
    """Microseconds of spinning that the environment asks for, None: as ONNX Runtime has it.

    That is long enough to outlast the gap between two steps, and sleeps soon after: 4 % faster than 1000 µs, 11 % than
    none at all. UsageError if the environment's value is no whole number from 0 on.
    """
    given = os.environ.get(SPIN)
    if given is None:
        return None
    if not given.isascii() or not given.isdigit():
        raise UsageError(f"{SPIN} must be microseconds, a whole number from 0 on, got {given!r}")
    return int(given)


def session_options(threads: int) -> ort.SessionOptions:
    """What every session is opened with; `threads=0` chooses."""
    options = ort.SessionOptions()
    if not threads:
        threads, why = cpu_threads()
        _log.info("ONNX Runtime computes with %d threads: %s", threads, why)
    options.intra_op_num_threads = threads
    spin = spin_us()
    if spin is not None:
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    if spin:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
    return options


def _session(path: Path, providers: list[str], threads: int) -> ort.InferenceSession:
    options = session_options(threads)
    # Errors come back as exceptions; ONNX Runtime's own lines on stderr would stand between the user's.
    options.log_severity_level = 4
    if CUDA in providers and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA libraries that pip installed beside torch
    with in_huge_pages():
        try:
            return ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            reason = str(error).splitlines()[0].strip() if str(error) else type(error).__name__
            raise InputError(
                f"{_culprit(path, reason)} cannot be loaded: {reason}",
                hint="export the model again, or copy all its files",
            ) from error


def _culprit(path: Path, reason: str) -> Path:
    """The file to name: the external weights if the message is about them, else the model file."""
    data = path.with_name(path.name + ".data")
    return data if data.name in reason or "external" in reason.lower() else path
