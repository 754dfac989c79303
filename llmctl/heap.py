"""What glibc's `malloc` does with large blocks, and what Python's collector of cycles looks at.

Elsewhere (musl, macOS, Windows) nothing is done about blocks; their allocators have no such settings.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's malloc.h."""
OWN_MAPPING = 8 << 20
"""Bytes from which a block has a mapping of its own inside `side_by_side`: when it is freed its memory goes back."""
HIGHEST = 32 << 20
"""Bytes; as far as glibc raises this threshold by itself, once a block of that size was freed."""


@contextmanager
def side_by_side() -> Iterator[None]:
    """Blocks of less than `OWN_MAPPING` that are allocated inside lie one behind another.

    Left to itself glibc gives every block of more than 128 KiB a mapping of its own. Setting its thresholds ends their
    being adapted, so they stay where a program that works with large arrays brings them; with low ones each larger
    array would be mapped, and its pages cleared, anew.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, 2 * HIGHEST)
    libc.mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, HIGHEST)
        libc.malloc_trim(ctypes.c_size_t(0))


@contextmanager
def settled() -> Iterator[None]:
    """What is alive now is passed over by collections of cycles inside, which stop the whole process.

    The modules of a server are 70,000 objects, and to look at all of them takes 20 ms, in which nobody gets a token.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back() -> None:
    """Free what only cycles of dead objects hold, and give free pages back to the system."""
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
