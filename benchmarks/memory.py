"""Memory that `llmctl plan` foretells against what trainings take: `python benchmarks/memory.py [--device cuda]`.

Each shape trains a few steps in a process of its own. On the CPU its peak of resident memory over what the process had
before is measured twice: as it is, and with an allocator that gives every block back at once
(MALLOC_MMAP_THRESHOLD_), which is what lives. On CUDA the peak is that of torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from llmctl.console import human_bytes, table
from llmctl.nn.config import ModelConfig
from llmctl.nn.presets import preset
from llmctl.train.footprint import Load, footprint
from llmctl.train.params import TrainParams

STEPS = 4
CPU: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "batch": ("llama", {"vocab_size": 1024, "dim": 128, "layers": 4, "heads": 4, "kv_heads": 4, "context": 128},
              {"batch_size": 32, "optimizer": "adamw"}),
    "wide": ("llama", {"vocab_size": 2048, "dim": 512, "layers": 6, "heads": 8, "kv_heads": 8, "context": 128},
             {"batch_size": 4}),
    "long": ("llama", {"vocab_size": 1024, "dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "context": 1024},
             {"batch_size": 8, "micro_batch": 4}),
    "vocabulary": ("gpt2", {"vocab_size": 32768, "dim": 192, "layers": 4, "heads": 6, "context": 256},
                   {"batch_size": 4, "optimizer": "adamw"}),
    "recompute": ("llama", {"vocab_size": 1024, "dim": 256, "layers": 8, "heads": 4, "kv_heads": 2, "context": 256},
                  {"batch_size": 16, "recompute": "full"}),
}  # fmt: skip
CUDA: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "124M": ("gpt2", {"vocab_size": 50304, "dim": 768, "layers": 12, "heads": 12, "context": 1024},
             {"batch_size": 16, "optimizer": "adamw"}),
    "350M": ("llama", {"vocab_size": 32000, "dim": 1024, "layers": 24, "heads": 16, "kv_heads": 16, "context": 2048},
             {"batch_size": 8, "micro_batch": 4}),
    "1.3B": ("llama", {"vocab_size": 32000, "dim": 2048, "layers": 24, "heads": 16, "kv_heads": 16, "context": 2048},
             {"batch_size": 4, "micro_batch": 2, "optimizer": "adamw", "recompute": "full"}),
}  # fmt: skip


def main() -> None:
    """Measure and print a row per shape; the last line is the worst ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="*", help="names of shapes; all by default")
    given = parser.parse_args()
    shapes = CUDA if given.device == "cuda" else CPU
    rows, ratios = [], []
    for name in given.shapes or shapes:
        arch, shape, settings = shapes[name]
        config = preset(arch, vocab_size=shape["vocab_size"], overrides=shape)
        params = TrainParams(**{"device": given.device, "prefetch": 0, "threads": 1, "save_every": 0, **settings})
        found = footprint(config, params, Load.of(params, config.context, cuda=given.device == "cuda"))
        measured = rehearsed(config, params)
        ratios.append(found.total / measured)
        row = [name, human_bytes(found.total), human_bytes(measured), f"{ratios[-1]:.2f}"]
        if given.device == "cpu":
            lives = found.total - found.parts["allocator"]
            at_once = rehearsed(config, params, MALLOC_MMAP_THRESHOLD_="131072")
            row += [human_bytes(lives), human_bytes(at_once), f"{lives / at_once:.2f}"]
        rows.append([*row, found.largest])
        print(*row, flush=True, file=sys.stderr)
    further = ["LIVES", "MEASURED", "RATIO"] if given.device == "cpu" else []
    print(table(["SHAPE", "PLANNED", "MEASURED", "RATIO", *further, "LARGEST"], rows))
    print(f"worst ratio {max(ratios, key=lambda ratio: abs(ratio - 1)):.2f}")


def rehearsed(config: ModelConfig, params: TrainParams, **environment: str) -> float:
    """Bytes that a few steps take at their peak."""
    asked = json.dumps({"config": config.to_dict(), "params": params.model_dump(mode="json"), "steps": STEPS})
    done = subprocess.run(
        [sys.executable, "-m", "llmctl.train.rehearsal"],
        input=asked, capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    return float(json.loads(done.stdout)["peak_bytes"])


if __name__ == "__main__":
    main()
