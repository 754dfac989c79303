"""Time and peak memory of one attention layer, forward and backward, by length: flash, windowed, naive, forced math.

    python benchmarks/attention.py [--lengths 2048 4096 8192] [--repeat 5]

One head of 64 channels, causal, float32, one thread; every measurement in a process of its own, the kinds interleaved.
`math` is the same call as `sdpa` with torch's fallback forced, which holds all scores.
The ratio printed last is time and memory of the last length over the one before it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

KINDS = ("sdpa", "window", "naive", "math")
WINDOW = 256


def measure(length: int, kind: str) -> None:
    """Print CPU seconds and peak resident MiB of one pass."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from llmctl.nn.attention import AttentionContext, backend
    from llmctl.nn.config import ModelConfig

    torch.set_num_threads(1)
    shape = {"vocab_size": 9, "dim": 64, "layers": 1, "heads": 1, "context": 1 << 20}
    context = AttentionContext(ModelConfig(arch="llama", window=WINDOW if kind == "window" else 0, **shape))
    q, k, v = (torch.randn(1, length, 1, 64, requires_grad=True) for _ in range(3))
    begun = time.process_time()
    if kind == "naive":
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (rows[0] @ rows[1].transpose(2, 3) / 8).masked_fill(future, -torch.inf)
        out = scores.softmax(-1) @ rows[2]
    else:
        with sdpa_kernel(SDPBackend.MATH) if kind == "math" else nullcontext():
            out = backend(context).attend(q, k, v, 0, context, None)
    out.sum().backward()
    seconds = time.process_time() - begun
    # Not ru_maxrss: a process inherits that of the one that started it, which may be larger.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(seconds, next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)


def main() -> None:
    """Run every length and kind, print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(int(args.measure[0]), args.measure[1])
        return
    found: dict[tuple[int, str], list[list[float]]] = {}
    for _ in range(args.repeat):
        for length in args.lengths:
            for kind in KINDS:
                command = [sys.executable, __file__, "--measure", str(length), kind]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault((length, kind), []).append([float(x) for x in done.stdout.split()])
    medians = {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in found.items()}
    print(f"{'length':>8}" + "".join(f"{kind + ' s':>12}{kind + ' MiB':>12}" for kind in KINDS))
    for length in args.lengths:
        cells = (f"{medians[length, kind][0]:12.3f}{medians[length, kind][1]:12.0f}" for kind in KINDS)
        print(f"{length:>8}" + "".join(cells))
    last, before = args.lengths[-1], args.lengths[-2]
    ratios = (f"{kind} {medians[last, kind][0] / medians[before, kind][0]:.2f} time" for kind in KINDS)
    memory = (f"{kind} {medians[last, kind][1] / medians[before, kind][1]:.2f} memory" for kind in KINDS)
    print(f"{last} over {before}: " + ", ".join([*ratios, *memory]))


if __name__ == "__main__":
    main()
