"""What the cache of keys and values saves: a decoding step over it, beside one that reads the whole prefix again.

The twin without a cache runs the same graph over all tokens so far, as generation without `past_key_values` does, and
takes the logits of the last one. Both sides are given the same tokens, the likeliest ones, and must agree in their
logits. Steps take turns. Printed
are medians in milliseconds, the median of the ratios, and how many tokens each side has fed to the graph.

    python benchmarks/kv_speedup.py exports/quickstart --length 64 256 --threads 1
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmctl.ort import OrtGenerator, open_bundle


class Cached:
    """Feeds one token a step."""

    def __init__(self, generator: OrtGenerator, prompt: list[int], capacity: int) -> None:
        self.rows, self.fed = generator.rows(1, capacity), len(prompt)
        self.logits = self.rows.feed(0, prompt)[-1]

    def step(self, token: int) -> None:
        """Go on with this token."""
        self.logits = self.rows.step([token])[0]
        self.fed += 1


class Recomputing:
    """Feeds the whole prefix every step."""

    def __init__(self, generator: OrtGenerator, prompt: list[int], capacity: int) -> None:
        self.rows, self.fed, self.prefix = generator.rows(1, capacity), len(prompt), list(prompt)
        self.logits = self.rows.feed(0, prompt)[-1]

    def step(self, token: int) -> None:
        """Go on with this token."""
        self.prefix.append(token)
        self.rows.restart()
        self.logits = self.rows.feed(0, self.prefix)[-1]
        self.fed += len(self.prefix)


def timed(act: Callable[[int], None], token: int) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    act(token)
    return time.perf_counter() - start


def measure(generator: OrtGenerator, length: int, steps: int) -> dict[str, float]:
    """Milliseconds a token behind `length` tokens with and without the cache, and the median of their ratios."""
    prompt = np.random.default_rng(length).integers(3, generator.vocab_size, length).tolist()
    sides = Cached(generator, prompt, length + steps + 1), Recomputing(generator, prompt, length + steps + 1)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(steps):
        best = int(sides[0].logits.argmax())
        gap = np.abs(sides[0].logits - sides[1].logits).max()
        if gap > 1e-3:
            raise SystemExit(f"step {number} behind {length}: the logits differ by {gap:.1e}")
        for side in (0, 1) if number % 2 else (1, 0):
            seconds[side].append(timed(sides[side].step, best))
    return {
        "cached_ms": 1e3 * statistics.median(seconds[0]),
        "recomputed_ms": 1e3 * statistics.median(seconds[1]),
        "ratio": statistics.median(b / a for a, b in zip(*seconds, strict=True)),
        "cached_fed": sides[0].fed,
        "recomputed_fed": sides[1].fed,
    }


def main() -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an ONNX bundle of a decoder")
    parser.add_argument("--length", type=int, nargs="+", default=[32, 128, 512, 1024])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    generator = open_bundle(args.bundle, "cpu", args.threads)
    found = []
    for length in args.length:
        one = measure(generator, length, args.steps)
        print(
            f"behind {length:5}: cached {one['cached_ms']:7.2f} ms, recomputed {one['recomputed_ms']:9.2f} ms, "
            f"ratio {one['ratio']:6.2f}; tokens fed {one['cached_fed']} and {one['recomputed_fed']}"
        )
        found.append({"length": length, **one})
    print(json.dumps({"benchmark": "kv_speedup", "machine": platform.machine(), "steps": found}))


if __name__ == "__main__":
    main()
