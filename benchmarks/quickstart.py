"""The quickstart over several seeds, with its negative twins: what each gate measures, and what a sabotaged run gives.

A twin differs in one parameter and must miss: answers dealt to the wrong questions (nothing can be learned but how
answers look), preferences swapped (the ranking must fall), channels pruned at random (the same distillation must
recover less).

    python benchmarks/quickstart.py --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TWINS: dict[str, tuple[str, str, str]] = {
    "shuffled answers": ("data.negative_twin=shuffled-answers", "eval-sft", "exact_match.value"),
    "swapped preferences": ("data.negative_twin=swapped-preferences", "eval-dpo", "ranking.rise"),
    "random pruning": ("prune.importance=random", "eval-distill", "exact_match.value"),
}
FIGURES = (
    ("eval-base", "perplexity.nats"),
    ("eval-base", "perplexity.nats_below_bigram"),
    ("eval-base", "perplexity.bits_per_byte"),
    ("eval-base", "perplexity.xz_bits_per_byte"),
    ("eval-base", "exact_match.value"),
    ("eval-sft", "exact_match.value"),
    ("eval-dpo", "ranking.reference"),
    ("eval-dpo", "ranking.value"),
    ("eval-dpo", "ranking.rise"),
    ("eval-dpo", "ranking.rise_low"),
    ("prune", "parameters.removed"),
    ("eval-distill", "exact_match.value"),
    ("onnx", "parity.max_abs_diff"),
    ("onnx", "parity.greedy_equal"),
    ("int8", "bits_per_byte.ratio"),
    ("int8", "bytes.ratio"),
    ("int4", "bits_per_byte.ratio"),
    ("int4", "bytes.ratio"),
    ("eval-int8", "exact_match.value"),
    ("rag", "recall@5.source"),
    ("rag", "recall@5.value"),
    ("rag", "citations.resolved"),
    ("rag", "refusal.value"),
)


def llmctl(directory: Path, *arguments: str) -> float:
    """Run a command in `directory`; its wall time in seconds. Gates only warn, so that every figure is seen."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "llmctl", "run", "quickstart", "--gates", "warn", *arguments]
    subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def metrics(directory: Path, stage: str) -> dict[str, Any]:
    """The final numbers of a stage of the last run in `directory`."""
    from llmctl.store import Store

    artifact = Store.open(directory / ".llmctl" / "store").resolve(f"quickstart/{stage}.metrics")
    found: dict[str, Any] = json.loads((artifact / "metrics.json").read_text())
    return found


def measure(seed: int, directory: Path) -> dict[str, float]:
    """One run and its twins, which share all that they have in common through the store."""
    seeded = ("--set", f"vars.seed={seed}")
    row = {"seconds": llmctl(directory, "--to", "serve", *seeded)}
    row["largest process, MiB"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    for stage, name in FIGURES:
        row[f"{stage}: {name}"] = metrics(directory, stage)[name]
    for twin, (change, stage, name) in TWINS.items():
        llmctl(directory, "--to", stage, *seeded, "--set", change)
        row[f"{twin}: {name}"] = metrics(directory, stage)[name]
    row["second run, seconds"] = llmctl(directory, *seeded)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table: one line per figure, one column per seed, and the spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args(arguments).seeds
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as directory:
            rows.append(measure(seed, Path(directory)))
        print(json.dumps({"seed": seed, **rows[-1]}), file=sys.stderr, flush=True)
    print("| Figure | " + " | ".join(f"seed {seed}" for seed in seeds) + " | median | spread |")
    print("|---|" + "---|" * (len(seeds) + 2))
    for name in rows[0]:
        values = [row[name] for row in rows]
        cells = [*(f"{value:.4g}" for value in values), f"{statistics.median(values):.4g}"]
        print(f"| {name} | " + " | ".join(cells) + f" | {max(values) - min(values):.2g} |")


if __name__ == "__main__":
    main()
