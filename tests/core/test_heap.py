"""Where glibc puts large blocks, and that freed ones go back, in a process of its own as settings last; collections."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, gc, weakref
from pathlib import Path
from llmctl.heap import OWN_MAPPING, give_back, side_by_side

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def heap():
    line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
    return [int(place, 16) for place in line.split()[0].split("-")]

def in_heap(address):
    start, end = heap()
    return start <= address < end

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def taken(size):
    address = libc.malloc(size)
    ctypes.memset(address, 1, size)
    return address

assert not in_heap(taken(1 << 20))
with side_by_side():
    small = [taken(1 << 20) for _ in range(40)]
    large = taken(OWN_MAPPING)
pin = taken(1000)
assert all(map(in_heap, small)) and not in_heap(large)
assert in_heap(taken(1 << 20)), "as in a program that has freed a large array"
full = resident()
libc.free(large)
assert resident() < full - (OWN_MAPPING >> 1)
for address in small:
    libc.free(address)

class Cycle:
    pass

dead = Cycle()
dead.own, gone = dead, weakref.ref(dead)
gc.disable()
del dead
assert gone() is not None
give_back()
assert gone() is None
assert resident() < full - OWN_MAPPING - (39 << 20)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_blocks_lie_side_by_side_and_go_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmctl import heap

    monkeypatch.setattr(heap.sys, "platform", "darwin")
    with heap.side_by_side():
        pass
    heap.give_back()


def test_collections_pass_over_what_was_alive_before() -> None:
    from llmctl.heap import settled

    class Cycle:
        pass

    with settled():
        assert gc.get_freeze_count() > 10_000  # the modules of this process
        assert len(gc.get_objects()) < 10_000
        dead = Cycle()
        dead.own = dead  # type: ignore[attr-defined]
        del dead
        assert gc.collect() >= 1, "what came later is collected"
    assert gc.get_freeze_count() == 0
