"""A stage must not outlive its runner: the kernel's parent-death signal, and a watchdog on a heartbeat pipe.

The signal (Linux) ends this process even inside a long call; the watchdog, a fork made before anything heavy is
imported, also ends what this process has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def tie_to(parent: int, heartbeat: int, others: tuple[int, ...] = ()) -> int:
    """End this process group when `parent` dies; returns the watchdog's pid.

    `heartbeat` is the read end of a pipe whose write end only the parent has; `others` are descriptors that the
    watchdog must not keep open. Called once, before any thread exists.
    """
    die_with(parent)
    watchdog = os.fork()
    if watchdog == 0:
        _watch(heartbeat, others)
    os.close(heartbeat)
    return watchdog


def die_with(parent: int) -> None:
    """End this process when `parent` dies (Linux: the thread of it that started this process)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It died between fork and prctl, so no signal will come.
        os._exit(137)


def release(watchdog: int) -> None:
    """End the watchdog of a process that ends by itself."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(watchdog, signal.SIGKILL)
        os.waitpid(watchdog, 0)


def _watch(heartbeat: int, others: tuple[int, ...]) -> None:
    """Wait for the end of the heartbeat, then end the group; never returns."""
    try:
        for number in FORWARDED:
            signal.signal(number, signal.SIG_IGN)
        for descriptor in others:
            os.close(descriptor)
        while os.read(heartbeat, 1):
            pass
        os.killpg(0, signal.SIGKILL)
    finally:
        os._exit(0)
