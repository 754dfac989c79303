"""Memory that is moved to huge pages: what it holds, what is chosen, and where nothing may be done."""

from __future__ import annotations

import mmap
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmctl.ort import huge_pages
from llmctl.ort.huge_pages import HUGE, THREAD, in_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux" or mmap.PAGESIZE != 4096, reason="huge pages of Linux")


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    monkeypatch.setattr(huge_pages, "WORTH_IT", HUGE)
    yield
    finish()


def finish() -> int:
    threads = [thread for thread in threading.enumerate() if thread.name == THREAD]
    for thread in threads:
        thread.join(60)
    return len(threads)


def memory(size: int, touched: int) -> tuple[mmap.mmap, int]:
    """Private memory of 4 KiB pages whose first `touched` bytes were written; its first address."""
    taken = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(taken, np.uint8)
    view[:touched:4096] = 7
    return taken, view.ctypes.data


def huge_kilobytes(address: int) -> int:
    """Of the mapping that `address` is in, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this kernel has no huge pages"
)
def test_what_comes_to_be_inside_is_moved_and_keeps_its_content() -> None:
    random_bytes = np.random.default_rng(0).integers(0, 256, 12 * HUGE, np.uint8)
    with in_huge_pages():
        held, address = memory(12 * HUGE, 12 * HUGE)
        np.frombuffer(held, np.uint8)[:] = random_bytes
    assert finish() == 1
    assert np.array_equal(np.frombuffer(held, np.uint8), random_bytes)
    assert huge_kilobytes(address + 4 * HUGE) >= 8 * (HUGE >> 10)


def test_only_memory_that_is_there_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "_collapse", lambda run: moved.append(run) or 0)
    with in_huge_pages():
        taken, address = memory(16 * HUGE, 6 * HUGE)
    finish()
    inside = [(start, end) for start, end in moved if address <= start < address + 16 * HUGE]
    assert inside
    assert all(start % HUGE == end % HUGE == 0 and end <= address + 6 * HUGE for start, end in inside)
    assert sum(end - start for start, end in inside) >= 5 * HUGE
    assert taken[0] == 7
    moved.clear()
    with in_huge_pages():
        pass
    finish()
    assert [run for run in moved if address <= run[0] < address + 16 * HUGE] == []


def test_names_of_files_may_be_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_bytes(
        b"7f00000000-7f00200000 r--p 00000000 fe:00 77 /lib/a\xff\xe2\x80\xa8b\x0cc.so\n"
        b"7f00400000-7f00800000 rw-p 00000000 00:00 0 \n7f00800000-7f00a00000 rw-p 00000000 00:00 0 [stack]\n"
        b"7f00c00000-7f00e00000 rw-p 00000000 00:00 0                  [heap]\n"
    )
    monkeypatch.setattr(huge_pages, "MAPS", maps)
    assert huge_pages._anonymous() == [(0x7F00400000, 0x7F00800000), (0x7F00C00000, 0x7F00E00000)]


@pytest.mark.parametrize("case", ["never", "no such file", "small", "no pagemap"])
def test_nothing_is_done(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    def unexpected(run: tuple[int, int]) -> int:
        raise AssertionError(run)

    monkeypatch.setattr(huge_pages, "_collapse", unexpected)
    if case == "never":
        huge_pages.SETTING.write_text("always madvise [never]\n")
    elif case == "no such file":
        huge_pages.SETTING.unlink()
    elif case == "small":
        monkeypatch.setattr(huge_pages, "WORTH_IT", 1 << 40)
    else:
        monkeypatch.setattr(huge_pages, "_resident", lambda range: iter(()))
    with in_huge_pages():
        held, _ = memory(8 * HUGE, 8 * HUGE)
    assert finish() == 0
    assert len(held) == 8 * HUGE


def test_memory_that_is_gone_or_refused_is_left() -> None:
    taken, address = memory(4 * HUGE, 4 * HUGE)
    start = -(-address // HUGE) * HUGE
    assert huge_pages._collapse((start + 1, start + HUGE)) == 0  # not the beginning of a page
    del taken


def test_ranges_without_others_are_what_sets_of_pages_say() -> None:
    rng = random.Random(0)
    for _ in range(200):
        cuts = sorted(rng.sample(range(60), 10))
        others = [(cuts[i], cuts[i + 1]) for i in range(0, 10, 2)]
        start, end = sorted(rng.sample(range(60), 2))
        found = list(huge_pages._without((start, end), others))
        taken = {page for first, last in others for page in range(first, last)}
        assert [page for first, last in found for page in range(first, last)] == [
            page for page in range(start, end) if page not in taken
        ]
