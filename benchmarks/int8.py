"""Decoding and reading prompts with weights and activations in 8 bits, beside float32: all bundles in turns.

The 82M LLaMA of `benchmarks/decode.py`. `weights 8` and `weights 4` are MatMulNBits (blocks of 64 and 32, activations
rounded in the kernel), `dynamic` and `static` the integer products of `quantize`'s `activations`. In every round each
bundle reads a prompt of 64 tokens and takes steps with 1 and with 8 rows behind 16 tokens; ratios to float32 are taken
round by round, then their median. Calibration is on random tokens, as the weights are: only speed is looked at.

    python benchmarks/int8.py --bundle HOME/fp32/model --threads 1 --rounds 7 --clock cpu

`--bundle` is an export of that shape in float32, as `benchmarks/decode.py --home HOME` leaves it. `--clock cpu` counts
the process's own CPU seconds, which with one thread is what a busy machine leaves comparable.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from llmctl.ort import OrtGenerator, open_bundle
from llmctl.ort.generator import prefill
from llmctl_quantize import activations, ranges, weights
from llmctl_quantize.tables import METHODS

BEHIND, STEPS, PROMPT = 16, 8, 64
WORK = ("prompt", "steps of 1", "steps of 8")


def integer(model: onnx.ModelProto, scratch: Path, static: bool) -> None:
    """Integer products, `static` with ranges of random tokens."""
    activations.prepare(model)
    found = None
    if static:
        ids = np.random.default_rng(0).integers(0, 8192, (4, 256)).tolist()
        found = ranges.whole(ranges.read(model, ids, scratch, 0, lambda done, total: None))
    activations.quantize(model, found, embeddings=True, reduce_range=False)


def blocks(model: onnx.ModelProto, bits: int) -> None:
    """Weights in blocks, as they are by default."""
    block, method = (32 if bits == 4 else 64), "rtn"  # how a block's range is found changes no speed
    weights.quantize(model, METHODS[method], bits=bits, block=block, symmetric=False, embedding_bits=8, accuracy=4)


def prepare(source: Path, home: Path) -> dict[str, Path]:
    """The bundles by name."""
    made = {"float32": source}
    for name in ("weights 8", "weights 4", "dynamic", "static"):
        target = home / name.replace(" ", "")
        target.mkdir()
        for path in source.iterdir():
            if not path.name.startswith("model.onnx"):
                shutil.copyfile(path, target / path.name)
        model = onnx.load(source / "model.onnx")
        if name.startswith("weights"):
            blocks(model, int(name[-1]))
        else:
            integer(model, target, name == "static")
        onnx.save_model(model, target / "model.onnx", save_as_external_data=True, location="model.onnx.data")
        made[name] = target
    return made


def read_prompt(generator: OrtGenerator, ids: list[int], clock: Callable[[], float]) -> float:
    """Seconds of reading a prompt."""
    rows = generator.rows(1, PROMPT)
    start = clock()
    prefill(rows, 0, ids)
    return clock() - start


def step(generator: OrtGenerator, batch: int, ids: list[int], clock: Callable[[], float]) -> float:
    """Seconds of one step of `batch` rows."""
    rows = generator.rows(batch, BEHIND + STEPS)
    for row in range(batch):
        prefill(rows, row, ids[row : row + BEHIND])
    tokens = ids[:batch]
    start = clock()
    for _ in range(STEPS):
        tokens = rows.step(tokens).argmax(axis=1).tolist()
    return (clock() - start) / STEPS


def main() -> None:
    """Take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    ids = np.random.default_rng(1).integers(0, 8192, PROMPT).tolist()
    with tempfile.TemporaryDirectory() as home:
        bundles = prepare(options.bundle, Path(home))
        sizes = {name: sum(p.stat().st_size for p in path.glob("model.onnx*")) for name, path in bundles.items()}
        sides = {name: open_bundle(path, "cpu", options.threads) for name, path in bundles.items()}
        taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
        for _ in range(options.rounds + 1):
            for name, side in sides.items():
                taken[name].append(
                    (read_prompt(side, ids, clock), step(side, 1, ids, clock), step(side, 8, ids, clock))
                )
    print(f"load average {os.getloadavg()[0]:.1f}, {options.rounds} rounds, {options.clock} time")
    for name, times in taken.items():
        line = f"{name:10} {sizes[name] / 1e6:6.1f} MB"
        for place, work in enumerate(WORK):
            own, plain = ([round_[place] for round_ in side[1:]] for side in (times, taken["float32"]))
            ratio = statistics.median(b / a for a, b in zip(own, plain, strict=True))
            line += f"; {work} {1000 * statistics.median(own):.1f} ms, {ratio:.2f} times as fast"
        print(line)


if __name__ == "__main__":
    main()
