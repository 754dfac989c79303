"""What structured pruning saves: the exported bundles of a model and of its pruned copies, prompts and decoding steps.

A LLaMA with random weights, since speed does not depend on them, goes through the stages `prune` and `export-onnx`. One
process opens all bundles; they take turns, each with the same tokens, in an order that changes every round. Printed are
the parameters, the bytes of weights and of graph, medians in milliseconds, and the medians of the dense model's time
over the pruned one's. Sparse models are there as the control: their zeros are stored and computed.

    python benchmarks/prune.py --dim 512 --layers 8 --threads 1
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmctl.nn.config import ModelConfig
from llmctl.nn.hf import load_config, save_model
from llmctl.nn.transformer import Transformer
from llmctl.ort import OrtGenerator, open_bundle
from llmctl.stage import Artifact
from llmctl.testing import run_stage
from llmctl.text.tokenizer import Tokenizer
from llmctl_export_onnx import EXPORT_ONNX
from llmctl_prune import PRUNE
from llmctl_tokenize import TOKENIZE

SIDES: dict[str, dict[str, Any]] = {
    "dense": {},
    "half the heads": {"heads_removed": 0.5, "mlp_width_removed": 0.0},
    "half the MLP": {"mlp_width_removed": 0.5},
    "half of both": {"heads_removed": 0.5, "mlp_width_removed": 0.5},
    "wanda, half 0": {"method": "wanda"},
}


def material(directory: Path, args: argparse.Namespace) -> tuple[Artifact, Artifact]:
    """A model with random weights, and token shards of some of Python's own text."""
    text = Path(argparse.__file__).read_text()
    with (directory / "text.jsonl").open("w") as out:
        for start in range(0, len(text), 500):
            out.write(json.dumps({"text": text[start : start + 500]}) + "\n")
    given = Artifact(directory / "text.jsonl", "dataset.text")
    made = run_stage(TOKENIZE, directory / "tokenize", {"vocab_size": args.vocab}, text=given).outputs
    tokenizer = Tokenizer.load(made["tokenizer"].path)
    torch.manual_seed(0)
    config = ModelConfig(
        arch="llama", vocab_size=tokenizer.vocab_size, dim=args.dim, layers=args.layers, heads=args.heads,
        kv_heads=args.kv_heads, context=1024, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
    )  # fmt: skip
    save_model(Transformer(config), directory / "model", made["tokenizer"].path)
    return Artifact(directory / "model", "model.hf"), made["tokens"]


def prepare(directory: Path, name: str, model: Artifact, tokens: Artifact) -> dict[str, Any]:
    """The side's bundle, opened, and how large it is."""
    place, params = directory / name.replace(" ", "-"), {"calibration_tokens": 2000, "evaluation_tokens": 1000}
    if SIDES[name]:
        result = run_stage(PRUNE, place / "prune", {**params, **SIDES[name]}, model=model, calibration=tokens)
        model = result.outputs["model"]
    bundle = run_stage(EXPORT_ONNX, place / "onnx", {"parity_prompts": 1}, model=model).outputs["model"].path
    stored = sum(file.stat().st_size for file in model.path.glob("model*.safetensors"))
    graph = sum(file.stat().st_size for file in bundle.glob("model.onnx*"))
    return {"bundle": bundle, "safetensors": stored, "onnx": graph, "parameters": load_config(model.path).parameters()}


def timed(generator: OrtGenerator, prompt: list[int], steps: int) -> tuple[float, float]:
    """Milliseconds of reading `prompt`, and of a decoding step behind it."""
    rows = generator.rows(1, len(prompt) + steps + 1)
    start = time.perf_counter()
    rows.feed(0, prompt)
    read = time.perf_counter()
    for number in range(steps):
        rows.step([prompt[number]])
    return 1e3 * (read - start), 1e3 * (time.perf_counter() - read) / steps


def measure(generators: dict[str, OrtGenerator], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over all rounds; the first round is thrown away."""
    prompt = np.random.default_rng(1).integers(6, 256, args.prompt).tolist()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in generators}
    names = list(generators)
    for round_ in range(args.rounds + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            found = timed(generators[name], prompt, args.steps)
            if round_:
                taken[name].append(found)
    table = {}
    for name, pairs in taken.items():
        row = {}
        for place, what in enumerate(("prompt", "step")):
            row[f"{what}_ms"] = statistics.median(pair[place] for pair in pairs)
            ratios = (base[place] / pair[place] for base, pair in zip(taken["dense"], pairs, strict=True))
            row[f"{what}_ratio"] = statistics.median(ratios)
        table[name] = row
    return table


def main() -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 512), ("layers", 8), ("heads", 8), ("kv-heads", 4), ("vocab", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("prompt", 256), ("steps", 32), ("rounds", 11), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = material(Path(folder), args)
        sides = {name: prepare(Path(folder), name, model, tokens) for name in SIDES}
        print(f"{len(sides)} bundles are made", file=sys.stderr)
        generators = {name: open_bundle(side.pop("bundle"), "cpu", args.threads) for name, side in sides.items()}
        found = {name: {**sides[name], **row} for name, row in measure(generators, args).items()}
    for name, row in found.items():
        print(
            f"{name:15} {row['parameters']:10} parameters, safetensors {row['safetensors'] / 1e6:6.1f} MB, "
            f"ONNX {row['onnx'] / 1e6:6.1f} MB; prompt {row['prompt_ms']:7.2f} ms ({row['prompt_ratio']:.2f} times as "
            f"fast), step {row['step_ms']:6.2f} ms ({row['step_ratio']:.2f})"
        )
    print(json.dumps({"benchmark": "prune", "machine": platform.machine(), "sides": found}))


if __name__ == "__main__":
    main()
