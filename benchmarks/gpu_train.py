"""Training on one GPU: tokens per second, utilisation against the matmul peak measured here, and where the rest goes.

    python benchmarks/gpu_train.py [--shapes 124M 1.3B] [--precision bf16] [--steps 10] [--trace DIRECTORY]

The peak is the best median of large matrix products in the same precision. Each LLaMA shape is then trained by the loop
of every stage (`llmctl.train.loop.fit`: AdamW, clipping, prefetch, `compile`) on made-up documents, in a process of its
own: some steps to warm up, some that are timed, three under the profiler. Without a CUDA device a tiny shape is trained
on CPU in float32, uncompiled, which shows only that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

SHAPES: dict[str, dict[str, Any]] = {
    "124M": {
        "model": {"layers": 12, "dim": 768, "heads": 12, "ff_dim": 2048, "vocab_size": 50304, "context": 1024},
        "train": {"batch_size": 64, "loss_chunk": 16384},
    },
    "1.3B": {
        "model": {"layers": 24, "dim": 2048, "heads": 16, "ff_dim": 5504, "vocab_size": 32000, "context": 2048},
        "train": {"batch_size": 32, "loss_chunk": 16384},
    },
    "tiny": {
        "model": {"layers": 2, "dim": 64, "heads": 2, "ff_dim": 192, "vocab_size": 512, "context": 64},
        "train": {"batch_size": 8, "loss_chunk": 0},
    },
}
WARMUP, PROFILED = 4, 3
KINDS = {
    "matrix products": r"gemm|nvjet|cutlass|aten::(mm|addmm|bmm)$|onednn|mkldnn::_linear",
    "attention": r"flash|fmha|attention|cudnn_generated",
    "optimizer": r"adam|multi_tensor|foreach|norm_kernel|lp_?norm",
    "copies": r"memcpy|memset|copy_|fill_|zero_",
}
"""What a kernel's name is looked for, in this order; the rest is point-wise work, norms and the loss."""
REST = "point-wise, norms, loss"


class Done(Exception):
    """The measurement is over; nothing has to be saved."""


def synchronised() -> float:
    """The time, when everything that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_peak(device: str, precision: str) -> float:
    """Operations per second of the best of a few large square products."""
    kind = {"bf16": torch.bfloat16, "float32": torch.float32}[precision]
    best = 0.0
    for size in (4096, 8192, 12288) if device == "cuda" else (512, 1024):
        a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
        seconds = []
        for _ in range(12):
            begun = synchronised()
            torch.mm(a, b)
            seconds.append(synchronised() - begun)
        best = max(best, 2 * size**3 / statistics.median(seconds[2:]))
    return best


class Meter:
    """Counts optimizer steps: times those after the warm-up, profiles the next, then ends the run."""

    def __init__(self, steps: int, trace: Path | None) -> None:
        self.taken, self.steps, self.trace = 0, steps, trace
        self.begun = self.seconds = self.profiled = 0.0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        register_optimizer_step_post_hook(self.stepped)

    def stepped(self, *_: Any) -> None:
        """Take note of a step."""
        self.taken += 1
        if self.taken == WARMUP:
            self.begun = synchronised()
        elif self.taken == WARMUP + self.steps:
            self.seconds = synchronised() - self.begun
            self.profiler.start()
            self.begun = synchronised()
        elif self.taken == WARMUP + self.steps + PROFILED:
            self.profiled = synchronised() - self.begun
            self.profiler.stop()
            if self.trace is not None:
                self.trace.parent.mkdir(parents=True, exist_ok=True)
                self.profiler.export_chrome_trace(str(self.trace))
            raise Done

    def shares(self, device: str) -> dict[str, float]:
        """Of the profiled time, by kind of kernel; what is left over is `idle`, or on CPU Python itself."""
        spent = dict.fromkeys([*KINDS, REST], 0.0)
        for event in self.profiler.key_averages():
            if device == "cuda" and event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            micro = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            found = (kind for kind, pattern in KINDS.items() if re.search(pattern, event.key, re.IGNORECASE))
            spent[next(found, REST)] += micro / 1e6
        shares = {kind: seconds / self.profiled for kind, seconds in spent.items()}
        return {**shares, "idle": max(0.0, 1 - sum(shares.values()))}


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a shape; its numbers."""
    import numpy as np

    from llmctl.nn.config import ModelConfig
    from llmctl.nn.counts import training_flops
    from llmctl.nn.transformer import Transformer
    from llmctl.stage import Context
    from llmctl.text.shards import ShardWriter, TokenShards
    from llmctl.train.data import TokenSource
    from llmctl.train.loop import fit
    from llmctl.train.objectives import CausalLM
    from llmctl.train.params import TrainParams

    shape = SHAPES[name]
    config = ModelConfig(arch="llama", kv_heads=shape["model"]["heads"], tie_embeddings=False, **shape["model"])
    tokens = shape["train"]["batch_size"] * config.context
    with tempfile.TemporaryDirectory() as temporary:
        home, rng, left = Path(temporary), np.random.default_rng(0), 4 * tokens
        with ShardWriter(home / "tokens", vocab_size=config.vocab_size, tokenizer="sha256:0") as writer:
            while left > 0:
                length = int(rng.geometric(1 / 600)) + 2
                writer.add("train", rng.integers(0, config.vocab_size, length), length)
                left -= length
        params = TrainParams(
            **shape["train"],
            optimizer="adamw",
            lr=3e-4,
            weight_decay=0.1,
            packing="crop",
            max_steps=10**6,
            micro_batch="auto",
            save_every=0,
            precision=options.precision,
            device=options.device,
            compile=options.compile,
            threads=options.threads,
        )
        source = TokenSource(TokenShards.open(home / "tokens").split("train"), config.context, params)
        torch.manual_seed(0)
        model = Transformer(config)
        meter = Meter(options.steps, options.trace and options.trace / f"{name}.json")
        metrics: list[tuple[str, dict[str, Any]]] = []
        context = Context(
            "train-pretrain", {"metrics": home / "metrics"}, home, lambda *e: metrics.append(e), lambda: False
        )
        with contextlib.suppress(Done):
            fit(context, model, CausalLM(), source, params)
    speed = options.steps * tokens / meter.seconds
    values = {"parameters": config.parameters(), "tokens_per_s": speed, "micro_batch": source.at_once}
    if options.device == "cuda":
        values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {**values, "flops": speed * training_flops(config, config.context), "shares": meter.shares(options.device)}


def main() -> None:
    """Measure the peak, then every shape in a process of its own; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--shapes", nargs="+", default=["124M", "1.3B"] if cuda else ["tiny"], choices=list(SHAPES))
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--precision", default="bf16" if cuda else "float32", choices=["bf16", "float32"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=0, help="on CPU; 0: all cores")
    parser.add_argument("--trace", type=Path, help="directory for a chrome trace of each shape")
    parser.add_argument("--shape", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape:
        print(json.dumps(train(options.shape, options)))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    peak = matmul_peak(options.device, options.precision)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.precision}: matmul peak {peak / 1e12:.2f} TFLOP/s", flush=True)
    for shape in options.shapes:
        command = [sys.executable, __file__, *sys.argv[1:], "--shape", shape]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        memory = f", {found['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in found else ""
        print(f"{shape}: {found['parameters']:,} parameters, micro-batch {found['micro_batch']}{memory}")
        flops = found["flops"]
        print(f"  {found['tokens_per_s']:,.0f} tokens/s, {flops / 1e12:.2f} TFLOP/s, MFU {flops / peak:.1%}")
        print("  " + ", ".join(f"{kind} {share:.1%}" for kind, share in found["shares"].items()), flush=True)


if __name__ == "__main__":
    main()
