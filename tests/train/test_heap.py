"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from llmctl.train.heap import keep_freed

if sys.argv[1] == "kept":
    keep_freed()

def step():
    parts = [torch.ones(700, 1024) for _ in range(12)]
    return sum(part.sum() for part in parts)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_steps_fault_no_pages_in_anew() -> None:
    def faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True).stdout)

    assert faults("given back") > 2000
    assert faults("kept") < 200
