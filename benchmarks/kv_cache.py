"""Decoding over a cache of keys and values in int8 beside the same bundle's in float32: bytes and tokens per second.

The int8 bundle is made of the given one as `quantize` makes it, with scales from random tokens: which codes are stored
changes nothing about speed. Steps of both take turns, at each length of what was read before, which is as good as
zeros here. Printed is the median over the steps of the ratio of their speeds.

    python benchmarks/kv_cache.py exports/quickstart --batch 1 8 --length 128 1024 --threads 1
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

from llmctl.ort import OrtGenerator, open_bundle
from llmctl.ort.cache import InPlaceRows
from llmctl.ort.cache_memory import token_bytes
from llmctl_quantize import cache


def copies(source: Path, home: Path, threads: int) -> tuple[OrtGenerator, OrtGenerator]:
    """The bundle as it is and with an int8 cache, both written alike: an original beside a copy was not a fair pair."""
    generator = open_bundle(source, "cpu", threads)
    texts = np.random.default_rng(0).integers(3, generator.vocab_size, (2, 64)).tolist()
    scales = cache.calibrate(generator, texts, lambda done, total: None)
    for name in ("float32", "int8"):
        model = onnx.load(source / "model.onnx")
        if name == "int8":
            cache.refuse(model, source)
            cache.quantize(model, scales)
        shutil.copytree(source, home / name, ignore=shutil.ignore_patterns("model.onnx*"))
        onnx.save_model(model, home / name / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return open_bundle(home / "float32", "cpu", threads), open_bundle(home / "int8", "cpu", threads)


def measure(sides: tuple[OrtGenerator, OrtGenerator], batch: int, length: int, steps: int) -> dict[str, float]:
    """Tokens per second of all rows together behind `length` tokens, float32 and int8, and their ratio."""
    rows = [InPlaceRows(side.session, side.layout, batch, length + steps + 3) for side in sides]
    seconds: list[list[float]] = [[], []]
    for one in rows:
        one.lengths[:] = length
    for step in range(steps + 3):
        for index in (0, 1) if step % 2 else (1, 0):
            start = time.perf_counter()
            rows[index].step([5] * batch)
            seconds[index].append(time.perf_counter() - start)
    before, after = (times[3:] for times in seconds)
    return {
        "float32": batch / statistics.median(before),
        "int8": batch / statistics.median(after),
        "ratio": statistics.median(a / b for a, b in zip(before, after, strict=True)),
    }


def main() -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an ONNX bundle of a decoder, in float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        sides = copies(args.bundle, Path(home), args.threads)
    size = [token_bytes(side.layout) for side in sides]
    print(f"bytes of a token: float32 {size[0]}, int8 {size[1]}, ratio {size[1] / size[0]:.3f}")
    found = []
    for batch in args.batch:
        for length in args.length:
            one = measure(sides, batch, length, args.steps)
            print(
                f"batch {batch:3}, behind {length:5}: float32 {one['float32']:8.1f} tokens/s, "
                f"int8 {one['int8']:8.1f} tokens/s, ratio {one['ratio']:.3f}"
            )
            found.append({"batch": batch, "length": length, **one})
    print(json.dumps({"benchmark": "kv_cache", "machine": platform.machine(), "bytes": size, "steps": found}))


if __name__ == "__main__":
    main()
