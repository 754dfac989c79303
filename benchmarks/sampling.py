"""What choosing tokens costs per step: the batch at once against one row after the other.

    python benchmarks/sampling.py [--rounds 15]

Prints the median of interleaved rounds in microseconds. Logits are normal with deviation 4, about as peaked as those
of a trained model; "flat" has deviation 1. "rows" is what a loop over rows costs that sorts each row whole, as the
engine did before: argmax or one argsort, softmax and cumulated sum for each answer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from llmctl.generator import Sampling
from llmctl.ort.sampling import choose, state

KINDS = {
    "greedy": Sampling(),
    "plain": Sampling(temperature=1.0, seed=1),
    "plain, flat": Sampling(temperature=1.0, seed=1),
    "top-k 50": Sampling(temperature=0.8, top_k=50, seed=1),
    "top-p .9": Sampling(temperature=0.8, top_p=0.9, seed=1),
    "min-p .05": Sampling(temperature=1.0, min_p=0.05, seed=1),
    "penalties": Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.5, seed=1),
}


def by_rows(logits: np.ndarray, samplings: list[Sampling], random: np.random.Generator) -> list[int]:
    """One row after the other, each sorted whole."""
    return [_whole(row, sampling, random) for row, sampling in zip(logits, samplings, strict=True)]


def _whole(row: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    if sampling.temperature == 0:
        return int(row.argmax())
    ids = np.arange(len(row))
    if sampling.top_k:
        ids = np.argpartition(-row, sampling.top_k)[: sampling.top_k]
    ids = ids[np.argsort(-row[ids], kind="stable")]
    weights = np.exp((row[ids].astype(np.float64) - float(row[ids[0]])) / sampling.temperature)
    sums = np.cumsum(weights / weights.sum())
    count = min(len(ids), int(np.searchsorted(sums, sampling.top_p)) + 1)
    return int(ids[min(count - 1, int(np.searchsorted(sums[:count], random.random() * sums[count - 1], "right")))])


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    random = np.random.default_rng(0)
    print(f"{'':14}{'B':>4}{'V':>8}{'batch us':>10}{'rows us':>10}{'ratio':>7}")
    for vocab in (8192, 128_000):
        for batch in (1, 16):
            for name, sampling in [*KINDS.items(), ("mixed", None)]:
                spread = 1 if "flat" in name else 4
                logits = random.normal(0, spread, (batch, vocab)).astype(np.float32)
                every = list(KINDS.values())
                samplings = [sampling or every[row % len(every)] for row in range(batch)]
                prompt = random.integers(0, vocab, 512).tolist()
                states = [state(one, prompt, vocab) for one in samplings]
                choose(logits, states)
                times = [
                    (
                        _microseconds(lambda logits=logits, states=states: choose(logits, states)),
                        _microseconds(lambda logits=logits, samplings=samplings: by_rows(logits, samplings, random)),
                    )
                    for _ in range(rounds)
                ]
                ours, rows = (statistics.median(column) for column in zip(*times, strict=True))
                print(f"{name:14}{batch:4}{vocab:8}{ours:10.0f}{rows:10.0f}{rows / ours:7.1f}")


if __name__ == "__main__":
    main()
