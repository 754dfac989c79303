"""Weights in huge pages: a step of decoding reads all of them, and in pages of 4 KiB it waits for addresses.

ONNX Runtime packs weights into memory of its own, which Linux gives in pages of 4 KiB unless it is asked for more. Each
page ends what the processor reads ahead, and its address has to be looked up. In pages of 2 MiB a float32 model of 82M
parameters decodes 1.2 times as fast on a Zen 5 server (`benchmarks/RESULTS.md`). In 4 bits many of its matrices are
smaller than a huge page, and glibc would give each a mapping of its own; so such are put one behind another meanwhile.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from llmctl.heap import side_by_side

Range = tuple[int, int]
"""First address, and that behind the last."""

HUGE = 2 << 20
"""Bytes of a huge page on x86-64, and on ARM with small pages of 4 KiB."""
PRESENT = 1 << 63
"""Of an entry of /proc/self/pagemap: the page is in memory."""
FULL = 0.9
"""Share of a huge page that must be in memory already, so that memory hardly grows."""
WORTH_IT = 8 << 20
"""Bytes; fewer stay in the processor's caches from step to step."""
THREAD = "huge pages"
MADV_COLLAPSE = 25
"""Linux 6.1: copy into huge pages now."""
MAPS = Path("/proc/self/maps")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_log = logging.getLogger(__name__)


@contextmanager
def in_huge_pages() -> Iterator[None]:
    """What is allocated inside, and in memory at its end, is moved to huge pages, if the system has and allows them.

    A thread does it, as Linux copies half a gigabyte a second, while the memory is used: content and addresses stay the
    same. Small amounts stay where they are. Where it cannot be done nothing happens.
    """
    before = _anonymous() if _offered() else None
    if before is None:
        yield
        return
    with side_by_side():
        yield
    new = [part for range in _anonymous() for part in _without(range, before)]
    runs = [run for range in new for run in _resident(range)]
    if sum(end - start for start, end in runs) >= WORTH_IT:
        with suppress(RuntimeError):  # no more threads may be started
            threading.Thread(target=_move, args=(runs,), name=THREAD, daemon=True).start()


def _move(runs: list[Range]) -> None:
    moved = sum(_collapse(run) for run in runs)
    _log.debug("%d MiB of %d MiB are in huge pages", moved >> 20, sum(end - start for start, end in runs) >> 20)


def _offered() -> bool:
    """Whether this system has huge pages of 2 MiB for whoever asks: its administrator may have said never."""
    try:
        return sys.platform == "linux" and mmap.PAGESIZE == 4096 and "[never]" not in SETTING.read_text()
    except OSError:
        return False


def _anonymous() -> list[Range]:
    """Private memory of the process that belongs to no file, the heap included, ascending."""
    found = []
    try:
        lines = MAPS.read_bytes().split(b"\n")
    except OSError:
        return []
    for line in filter(None, lines):
        place, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == b"rw-p" and inode == b"0" and name in ([], [b"[heap]"]):
            start, end = (int(address, 16) for address in place.split(b"-"))
            found.append((start, end))
    return found


def _without(range: Range, others: list[Range]) -> Iterator[Range]:
    """The parts of `range` outside all of `others`, which ascend."""
    start, end = range
    for first, last in others:
        if last <= start or first >= end:
            continue
        if first > start:
            yield start, first
        start = max(start, last)
    if start < end:
        yield start, end


def _resident(range: Range) -> Iterator[Range]:
    """Runs of whole huge pages in `range` that are in memory nearly in full."""
    start, end = -(-range[0] // HUGE) * HUGE, range[1] // HUGE * HUGE
    if end <= start:
        return
    each = HUGE // mmap.PAGESIZE
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            entries = os.pread(file.fileno(), (end - start) // mmap.PAGESIZE * 8, start // mmap.PAGESIZE * 8)
    except OSError:
        return
    pages = np.frombuffer(entries, np.uint64)
    pages = pages[: len(pages) // each * each].reshape(-1, each)
    full = ((pages & PRESENT) != 0).mean(1) >= FULL
    edges = np.flatnonzero(np.diff(np.concatenate([[False], full, [False]])))
    for first, last in list(pairwise(edges.tolist()))[::2]:
        yield start + first * HUGE, start + last * HUGE


def _collapse(run: Range) -> int:
    """Move a run to huge pages; bytes for which Linux did so."""
    start, end = run
    libc = ctypes.CDLL(None, use_errno=True)
    place, size = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
    if libc.madvise(place, size, mmap.MADV_HUGEPAGE):  # a kernel without; or this memory cannot
        return 0
    # Before Linux 6.1 the kernel's own thread does it in the course of minutes.
    return 0 if libc.madvise(place, size, MADV_COLLAPSE) else end - start
