"""How long the pool of past prefixes is searched for the longest beginning: sorted, against a look at all of them.

Both sides find the same lengths in turns; printed are medians and the median of the ratios.

    python benchmarks/prefixes.py --tokens 32 256
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import numpy as np

from llmctl.ort.prefixes import Prefix, PrefixPool, common

CAPACITY = 16 * 1024
"""Tokens of the pool: sixteen slots of 2048 have it."""
SHARED = 16
"""Tokens that all sequences begin with, as a system prompt."""


def look_at_all(kept: list[np.ndarray], tokens: np.ndarray) -> int:
    """The longest common beginning."""
    return max((common(one, tokens) for one in kept), default=0)


def measure(length: int, rounds: int) -> dict[str, float]:
    """Medians in microseconds for sequences of so many tokens, and how many fit."""
    random = np.random.default_rng(0)
    count = CAPACITY // (SHARED + length)
    kept = [
        np.concatenate([np.arange(SHARED), random.integers(0, 8192, length)]).astype(np.int32) for _ in range(count)
    ]
    pool = PrefixPool(CAPACITY)
    for tokens in kept:
        pool.add(Prefix(tokens, np.zeros(0, np.float32)))
    times: dict[str, list[float]] = {"sorted": [], "all": []}
    for _ in range(rounds):
        asked = np.concatenate([kept[random.integers(count)][: SHARED + length // 2], random.integers(0, 8192, 8)])
        begun = time.perf_counter()
        _, found = pool.match(asked)
        middle = time.perf_counter()
        wanted = look_at_all(kept, asked)
        times["sorted"].append(middle - begun)
        times["all"].append(time.perf_counter() - middle)
        assert found == wanted
    ratios = [b / a for a, b in zip(times["sorted"], times["all"], strict=True)]
    return {
        "sequences": count,
        **{f"{name}_us": 1e6 * statistics.median(some) for name, some in times.items()},
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 256], help="of a sequence behind the shared ones")
    parser.add_argument("--rounds", type=int, default=500)
    args = parser.parse_args()
    found = {length: measure(length, args.rounds) for length in args.tokens}
    for length, one in found.items():
        print(
            f"{one['sequences']:4.0f} sequences of {length + SHARED} tokens: sorted {one['sorted_us']:6.1f} us, "
            f"all {one['all_us']:7.1f} us, ratio {one['ratio']:.0f}"
        )
    print(json.dumps({"benchmark": "prefixes", "machine": platform.machine(), "lengths": found}))


if __name__ == "__main__":
    main()
