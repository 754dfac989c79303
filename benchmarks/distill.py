"""Distillation on the small anchor: how near the student comes to its teacher at equal steps, and what it costs to run.

    python benchmarks/distill.py --seeds 0 1 2
    python benchmarks/distill.py --bundles TEACHER STUDENT            two ONNX bundles: sizes, tokens per second

The teacher is the anchor's `default` recipe (benchmarks/anchor.py: 4 layers of width 128, 300 steps). The student is
the teacher without a layer (`prune`), trained for 80 steps of 8 rows by cross-entropy alone (`alpha: 1`) or as the
methods of `distill` have it: AdamW, rate 5e-4, 10 steps of warm-up, linear decay. KL(teacher, student) in nats per
token of the validation split, at temperature 1. The twin `shuffled` learns from the same distributions at other places,
and must miss.

Speed: greedy tokens one at a time over the cache of keys and values, ONNX Runtime, one thread, the two bundles in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anchor
import numpy as np

RATE = ["--optimizer", "adamw", "--lr", "5e-4", "--schedule", "linear", "--warmup-steps", "10"]
STEPS = ["--max-steps", "80", "--batch-size", "8", "--save-every", "0", "--threads", "1", "--device", "cpu"]
METHODS: dict[str, list[str]] = {
    "cross-entropy": ["--alpha", "1"],
    "forward KL": [],
    "forward KL, T 2": ["--temperature", "2"],
    "jsd, beta .5": ["--divergence", "jsd"],
    "reverse KL": ["--divergence", "reverse-kl"],
    "hidden states": ["--method", "hidden"],
    "hidden states, squared": ["--method", "hidden", "--hidden-loss", "mse"],
    "hidden states, relations": ["--method", "hidden", "--relations", "both"],
}
SHUFFLED = "shuffled"


def prepare(directory: Path, seed: int, steps: int = 300) -> dict[str, Path]:
    """Corpus, tokens, a trained teacher, and the teacher without a layer."""
    anchor.write_corpus(directory / "text")
    made = anchor.llmctl(
        directory, "tokenize", "--text", "text", "--vocab-size", str(anchor.VOCABULARY + anchor.SPECIAL)
    )
    shape = ["--context", str(anchor.CONTEXT), "--batch-size", "16", "--max-steps", str(steps), "--seed", str(seed)]
    inputs = ["--tokens", str(made["tokens"]), "--tokenizer", str(made["tokenizer"])]
    running = ["--device", "cpu", "--threads", "1", "--save-every", "0"]
    teacher = anchor.llmctl(directory, "train-pretrain", *inputs, *anchor.LLAMA, *shape, *running)["model"]
    how = ["--layers-removed", "1", "--mlp-width-removed", "0"]
    given = ["--model", str(teacher), "--calibration", str(made["tokens"])]
    student = anchor.llmctl(directory, "prune", *given, *how)["model"]
    return {"tokens": made["tokens"], "teacher": teacher, "student": student}


def distil(directory: Path, made: dict[str, Path], seed: int, further: Sequence[str]) -> dict[str, Any]:
    """The metrics of one distillation, and where its student is."""
    inputs = [part for name in ("teacher", "student") for part in (f"--{name}", str(made[name]))]
    inputs += ["--data", str(made["tokens"])]
    out = anchor.llmctl(directory, "distill", *inputs, *RATE, *STEPS, "--seed", str(seed), *further)
    return {**json.loads((out["metrics"] / "metrics.json").read_text(encoding="utf-8")), "model": out["model"]}


@contextmanager
def shuffled() -> Iterator[None]:
    """The teacher's distributions reach the student in another order of places; measured is the teacher as it is."""
    from llmctl_distill.losses import LogitDistillation

    compare = LogitDistillation.compare

    def turned(self: Any, model: Any, states: Any, goals: Any, targets: Any) -> Any:
        return compare(self, model, states, goals.flip(0) if model.training else goals, targets)

    LogitDistillation.compare = turned  # type: ignore[method-assign]
    try:
        yield
    finally:
        LogitDistillation.compare = compare  # type: ignore[method-assign]


def sabotaged(directory: Path, made: dict[str, Path], seed: int) -> dict[str, Any]:
    """The metrics of the twin, which runs in this process."""
    from llmctl.registry import get_registry
    from llmctl.stage import Artifact
    from llmctl.testing import run_stage

    params = {"optimizer": "adamw", "lr": 5e-4, "schedule": "linear", "warmup_steps": 10, "seed": seed}
    params |= {"max_steps": 80, "batch_size": 8, "save_every": 0, "threads": 1, "device": "cpu"}
    given = {name: Artifact(made[name], "model.hf") for name in ("teacher", "student")}
    data = Artifact(made["tokens"], "dataset.tokens")
    with shuffled():
        return run_stage(
            get_registry().stages["distill"], directory / f"twin-{seed}", params, data=data, **given
        ).metrics


def measure(directory: Path, made: dict[str, Path], seed: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By method: the metrics."""
    found = {}
    for name in names:
        found[name] = (
            sabotaged(directory, made, seed) if name == SHUFFLED else distil(directory, made, seed, METHODS[name])
        )
    return found


def speeds(bundles: Sequence[Path], length: int = 64, rounds: int = 30) -> list[dict[str, float]]:
    """Sizes and median tokens per second of each bundle, in turn."""
    from llmctl.ort import open_bundle

    generators = [open_bundle(path, threads=1) for path in bundles]
    prompt = np.random.default_rng(0).integers(8, generators[0].vocab_size, 16).tolist()
    seconds: list[list[float]] = [[] for _ in bundles]
    for number in range(rounds + 1):  # the first one warms up
        for index in sorted(range(len(bundles)), reverse=bool(number % 2)):
            rows = generators[index].rows(1, len(prompt) + length + 1)
            logits = rows.feed(0, prompt)[-1]
            start = time.perf_counter()
            for _ in range(length):
                logits = rows.step([int(logits.argmax())])[0]
            seconds[index].append(time.perf_counter() - start)
    sizes = [sum(file.stat().st_size for file in path.iterdir() if ".onnx" in file.name) for path in bundles]
    return [
        {"megabytes": size / 1e6, "tokens_per_s": length / statistics.median(some[1:])}
        for size, some in zip(sizes, seconds, strict=True)
    ]


def show_speeds(bundles: Sequence[Path]) -> None:
    """Print a line per bundle, and the ratios."""
    found = speeds(bundles)
    for name, row in zip(("teacher", "student"), found, strict=True):
        print(f"{name}: {row['megabytes']:.2f} MB, {row['tokens_per_s']:.0f} tokens/s")
    size, speed = (found[1][key] / found[0][key] for key in ("megabytes", "tokens_per_s"))
    print(f"student over teacher: {size:.3f} of the bytes, {speed:.2f} times the tokens per second")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per seed and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bundles", type=Path, nargs=2)
    args = parser.parse_args(arguments)
    if args.bundles:
        show_speeds(args.bundles)
        return
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            made = prepare(directory, seed)
            found = measure(directory, made, seed, [*METHODS, SHUFFLED])
            base = found["cross-entropy"]["kl.validation"]
            print(f"seed {seed}: pruned, not trained: KL {found['cross-entropy']['kl.before']:.4f}")
            for name, row in found.items():
                kl = row["kl.validation"]
                print(
                    f"  {name}: KL {kl:.4f}, {kl / base:.3f} of cross-entropy's, CE {row['ce.validation']:.4f}",
                    flush=True,
                )
            models = (made["teacher"], found["forward KL"]["model"])
            sizes = [found["forward KL"][name] for name in ("teacher.parameters", "parameters")]
            print(f"  parameters: teacher {sizes[0]}, student {sizes[1]}")
            exported = [anchor.llmctl(directory, "export-onnx", "--model", str(model))["model"] for model in models]
            show_speeds(exported)


if __name__ == "__main__":
    main()
