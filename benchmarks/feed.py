"""How fast batches are made: our sources alone against a plain torch DataLoader over the same memory-mapped tokens.

    python benchmarks/feed.py [--tokens 50000000] [--seconds 3] [--context 1024] [--batch 32]

The DataLoader cuts rows out of the flat array at random and knows nothing of documents, positions or epochs: the least
that any loader does. Prints rows and tokens per second, and the ratio to it; rounds are interleaved, medians are shown.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from llmctl.text.shards import ShardWriter, SplitTokens, TokenShards
from llmctl.train.data import TokenSource
from llmctl.train.mixing import MixedSource
from llmctl.train.params import TrainParams
from llmctl.train.prefetch import Prefetch

ROUNDS = 5


class Plain(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows of a flat array, as most training scripts have them."""

    def __init__(self, tokens: np.ndarray, context: int) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.tokens[index * self.context : (index + 1) * self.context + 1].astype(np.int64)
        return torch.from_numpy(ids[:-1]), torch.from_numpy(ids[1:])


def write(directory: Path, tokens: int) -> SplitTokens:
    """Documents of geometric length, 600 tokens on average."""
    rng = np.random.default_rng(0)
    with ShardWriter(directory, vocab_size=50000, tokenizer="sha256:0") as writer:
        while tokens > 0:
            length = int(rng.geometric(1 / 600)) + 2
            writer.add("train", rng.integers(0, 50000, length), length)  # type: ignore[arg-type]  # an array is quicker
            tokens -= length
    return TokenShards.open(directory).split("train")


def loader(split: SplitTokens, context: int, batch: int) -> Iterator[object]:
    """Batches of the plain loader without an end."""
    rows = Plain(np.asarray(split.tokens), context)
    while True:
        yield from DataLoader(rows, batch, sampler=RandomSampler(rows, replacement=True))


def makers(split: SplitTokens, context: int, batch: int) -> dict[str, Callable[[int], object]]:
    """What makes the batch of a step, by name."""
    plain = loader(split, context, batch)
    found: dict[str, Callable[[int], object]] = {"torch DataLoader": lambda step: next(plain)}
    for packing in ("documents", "best-fit", "crop"):
        begin = time.perf_counter()
        source = TokenSource(split, context, TrainParams(batch_size=batch, packing=packing))
        count = source.rows.count
        print(
            f"{packing}: opened in {time.perf_counter() - begin:.2f} s, {count.rows} rows "
            f"{count.tokens / (count.rows * context):.2%} full, {count.cut / count.documents:.1%} of documents cut, "
            f"{count.dropped / (count.targets + count.dropped):.1%} of targets dropped"
        )
        found[packing] = source.micro_batches
    params = TrainParams(batch_size=batch, max_steps=1)
    parts = [TokenSource(split, context, params) for _ in range(3)]
    found["mixture of three"] = MixedSource(parts, params, (5, 3, 2)).micro_batches
    found["documents, by a thread"] = Prefetch(parts[0], 2, torch.device("cpu")).take
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 50_000_000), ("context", 1024), ("batch", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        split = write(Path(directory), given.tokens)
        print(f"{len(split.tokens)} tokens, {len(split)} documents, rows of {given.context}, {given.batch} at a time")
        made = makers(split, given.context, given.batch)
        steps, rates = dict.fromkeys(made, 0), {name: [] for name in made}
        for _ in range(ROUNDS):
            for name, make in made.items():
                begin, first = time.perf_counter(), steps[name]
                while time.perf_counter() - begin < given.seconds / ROUNDS:
                    make(steps[name])
                    steps[name] += 1
                rates[name].append((steps[name] - first) * given.batch / (time.perf_counter() - begin))
        base = statistics.median(rates["torch DataLoader"])
        for name, values in rates.items():
            rows = statistics.median(values)
            print(f"{name:24} {rows:9.0f} rows/s {rows * given.context / 1e6:7.1f} M tokens/s  x {rows / base:.2f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, the mapped file included")


if __name__ == "__main__":
    main()
