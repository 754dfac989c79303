"""What attention costs: memory without the square of the length, and for a window work without it too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from llmctl.nn.attention import AttentionContext, backend
from llmctl.nn.config import ModelConfig

PEAK = """
import sys, torch
from contextlib import nullcontext
from torch.nn.attention import SDPBackend, sdpa_kernel
from llmctl.nn.attention import AttentionContext, backend
from llmctl.nn.config import ModelConfig
length, kind = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
shape = {"vocab_size": 9, "dim": 64, "layers": 1, "heads": 1, "context": 1 << 20}
context = AttentionContext(ModelConfig(arch="llama", window=256 if kind == "window" else 0, **shape))
q, k, v = (torch.randn(1, length, 1, 64, requires_grad=True) for _ in range(3))
if kind == "naive":
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = (q @ k.transpose(2, 3) / 8).masked_fill(future, float("-inf")).softmax(-1) @ v
else:
    with sdpa_kernel(SDPBackend.MATH) if kind == "math" else nullcontext():
        out = backend(context).attend(q, k, v, 0, context, None)
out.sum().backward()
# Not ru_maxrss: a process inherits that of the one that started it, which may be larger.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(length: int, kind: str) -> int:
    """Peak resident KiB of one forward and backward pass in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(length), kind], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdpa", "window"])
def test_memory_does_not_grow_with_the_square(kind):
    assert peak(8192, kind) / peak(4096, kind) < 1.6
    assert peak(8192, kind) < 0.5 * peak(8192, "naive")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["naive", "math"])
def test_scores_held_whole_would_fail_that(kind):
    """`math` is torch's own fallback, forced: the kernel that a training names is the one that matters."""
    assert peak(8192, kind) / peak(4096, kind) > 1.6
    assert peak(8192, kind) > 2 * peak(8192, "sdpa")


@pytest.mark.parametrize(("window", "growth"), [(256, 2), (0, 4)])
def test_a_windows_work_is_linear_in_the_length(window, growth, monkeypatch):
    """Scores computed, counted: twice the length costs a window twice, full attention four times."""
    plain, count = F.scaled_dot_product_attention, [0]

    def counting(q, k, *args, **kwargs):
        count[0] += q.shape[2] * k.shape[2]
        return plain(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    shape = {"vocab_size": 9, "dim": 8, "layers": 1, "heads": 1, "context": 1 << 20}
    context = AttentionContext(ModelConfig(arch="llama", window=window, **shape))
    found = []
    for length in (2048, 4096):
        count[0] = 0
        q, k, v = torch.randn(3, 1, length, 1, 8)
        backend(context).attend(q, k, v, 0, context, None)
        found.append(count[0])
    assert found[1] / found[0] == pytest.approx(growth, rel=0.1)
