"""Decoding on the CPU: our engine beside its peers on the same weights, in turns, and beside what the memory can give.

An 82M LLaMA (12 layers, width 768, 12 query and 4 key/value heads, vocabulary 8192) with random weights answers
prompts of 64 tokens with 128 new ones, greedily, in float32 and in 4 bits; `int4-kv8` has an int8 cache besides. Our
side runs the bundles of `export-onnx` and `quantize`; Optimum its own export; onnxruntime-genai our bundles and, in 4
bits, what its own builder makes of the weights, with the threads of all and with those that it chooses (`as it comes`:
half of the processors); llama.cpp GGUF files of the same weights, F32 and Q4_0. `products` is a graph of nothing but
our bundle's matrix products, `two tokens` our bundle's whole graph over a cache of two tokens, called with nothing
around it: however fast the cache is read, a step of these operators takes as long. Each side is a process that waits
while another works. In every round each side answers with one token and with all: the difference is decoding without
the prompt. Ratios are taken round by round, then their median. In float32 all sides must give the same tokens.
`--peers` is the interpreter of an environment with what `benchmarks/peers/decode.py` names; without it only Optimum is
beside us.

    python benchmarks/decode.py --peers peers/bin/python --threads 2 --rounds 5

With a GPU the same is done there, in float16: our engine on ONNX Runtime's CUDA provider and `transformers.generate` in
torch, of a model with the shape of LLaMA 3.2 1B; the memory is then the device's.

    python benchmarks/decode.py --device cuda --shape 1b
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PROMPT, NEW = 64, 128
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}

SHAPES = {
    "82m": SHAPE,
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
UNTILED = "not tiled"
"""Ours again, without ONNX Runtime's flash kernel of attention, which makes a step over an int8 cache slower."""
FORMATS = ("fp32", "fp16", "int4", "int4-kv8")


def prepare(
    home: Path,
    peers: str | None,
    block: int,
    symmetric: bool,
    shape: dict[str, Any] = SHAPE,
    formats: Sequence[str] = ("fp32", "int4"),
) -> None:
    """Make the model and every side's files below `home`, once."""
    from llmctl import Artifact
    from llmctl.testing import run_stage

    source = home / "hf"
    int4 = bool({"int4", "int4-kv8"} & set(formats))
    if not (source / "config.json").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        # An end that no prompt of these reaches: all sides make all tokens.
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
        LlamaForCausalLM(LlamaConfig(**shape, **ids)).save_pretrained(source)
    for kind, dtype in (("fp32", "float32"), ("fp16", "float16")):
        wanted = kind in formats or (kind == "fp32" and int4)
        if wanted and not (home / kind / "model" / "model.onnx").is_file():
            from llmctl_export_onnx import EXPORT_ONNX

            params = {"parity_prompts": 2, "dtype": dtype}
            run_stage(EXPORT_ONNX, home / kind, params, model=Artifact(source, "model.hf"))
    if int4 and not (home / "int4" / "model" / "model.onnx").is_file():
        from llmctl_quantize import QUANTIZE

        # How codes are chosen changes nothing about speed; `rtn` is done sooner.
        params = {"bits": 4, "method": "rtn", "block_size": block, "symmetric": symmetric, "speed_rounds": 1}
        run_stage(QUANTIZE, home / "int4", params, model=Artifact(home / "fp32" / "model", "model.onnx"))
    if "int4-kv8" in formats and not (home / "int4-kv8" / "model" / "model.onnx").is_file():
        round_cache(home, shape["vocab_size"])
    if "fp32" in formats and not (home / "optimum" / "model.onnx").is_file():
        from optimum.exporters.onnx import main_export

        main_export(str(source), home / "optimum", task="text-generation-with-past", do_validation=False)
    if peers and not (home / "int4.gguf").is_file():
        subprocess.run([peers, HERE / "peers" / "decode.py", "convert", source, home], check=True)
    if peers and not (home / "genai" / "genai_config.json").is_file():
        subprocess.run([peers, HERE / "peers" / "decode.py", "build", source, home / "genai"], check=True)


def round_cache(home: Path, vocabulary: int) -> None:
    """The 4-bit bundle with an int8 cache; random tokens give its scales, as the weights are random, too."""
    import onnx

    from llmctl.ort import open_bundle
    from llmctl_quantize import cache

    texts = np.random.default_rng(1).integers(3, vocabulary, (4, PROMPT + NEW)).tolist()
    scales = cache.calibrate(open_bundle(home / "fp32" / "model", "cpu"), texts, lambda *_: None)
    target = home / "int4-kv8" / "model"
    fresh = target.with_name("unfinished")  # what bears the name `model` is taken as it is
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(home / "int4" / "model", fresh)
    model = onnx.load(fresh / "model.onnx", load_external_data=False)
    cache.quantize(model, scales)
    onnx.save(model, fresh / "model.onnx")
    fresh.rename(target)


class Side:
    """A process that answers when asked."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, **(environment or {})},
            )

    def ask(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds that the answers took, and the answers."""
        found = self.exchange({"prompts": prompts, "new": new})
        return found["seconds"], found["tokens"]

    def exchange(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One line of JSON to the process, one from it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended early: {self.log.read_text()[-2000:]}")
        return dict(json.loads(line))

    def end(self) -> None:
        """Let the process go."""
        self.process.communicate()


def start(home: Path, kind: str, threads: int, peers: str | None, device: str) -> dict[str, Side]:
    """The sides that compute in the format `kind`."""

    def ours(name: str, directory: Path) -> list[str]:
        return [sys.executable, str(HERE / "decode.py"), "--work", name, str(directory), str(threads), device]

    commands = {"llmctl": ours("llmctl", home / kind / "model")}
    if kind == "fp16":
        commands["transformers"] = ours("transformers", home / "hf")
    else:
        commands |= {name: ours(name, home / kind / "model") for name in ("products", "two tokens")}
    if kind == "fp32":
        commands["optimum"] = ours("optimum", home / "optimum")
    if peers and kind != "fp16":
        theirs = [peers, str(HERE / "peers" / "decode.py")]
        if kind != "int4-kv8":
            commands["genai"] = [*theirs, "genai", str(home / kind / "model"), str(threads)]
        if kind != "fp32":
            commands["genai's own"] = [*theirs, "genai", str(home / "genai"), str(threads)]
        model = home / ("fp32/model" if kind == "fp32" else "genai")
        commands["genai as it comes"] = [*theirs, "genai", str(model), "0"]
        commands["llama.cpp"] = [*theirs, "llama.cpp", str(home / f"{kind.split('-')[0]}.gguf"), str(threads)]
    if kind == "int4-kv8":
        commands[UNTILED] = commands["llmctl"]
    return {
        name: Side(
            command, home / f"{name}-{kind}.log", {"ORT_GQA_DISABLE_FLASH_ATTENTION": "1"} if name == UNTILED else {}
        )
        for name, command in commands.items()
    }


def memory(size: int) -> np.ndarray:
    """`size` bytes of ones in huge pages, where Linux has them: it is read faster so, and our weights lie so, too."""
    taken = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            taken.madvise(mmap.MADV_HUGEPAGE)
    found = np.frombuffer(taken, np.float32)
    found[:] = 1
    return found


def bandwidth(pool: ThreadPoolExecutor, parts: list[np.ndarray]) -> float:
    """Bytes per second at which all threads together read memory: the largest number of 256 MiB."""
    start = time.perf_counter()
    list(pool.map(np.max, parts))
    return sum(part.nbytes for part in parts) / (time.perf_counter() - start)


def device_bandwidth() -> float:
    """Bytes per second at which the GPU reads its memory: the largest number of a gibibyte."""
    import torch

    values = torch.ones(2**29, dtype=torch.float16, device="cuda")
    values.amax()
    torch.cuda.synchronize()
    start = time.perf_counter()
    values.amax()
    torch.cuda.synchronize()
    return values.nbytes / (time.perf_counter() - start)


def numbers_per_token(source: Path) -> int:
    """Weights that a step reads: all but the embedding, of which it is one row, unless that is the head, too."""
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", "np") as file:
        sizes = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    tied = "lm_head.weight" not in sizes
    return sum(size for name, size in sizes.items() if tied or "embed_tokens" not in name)


def compare(
    sides: dict[str, Side], batch: int, rounds: int, threads: int, equal: bool, vocabulary: int, device: str
) -> dict[str, Any]:
    """Let the sides take turns, the order turned round every time."""
    prompts = np.random.default_rng(0).integers(3, vocabulary, (batch, PROMPT)).tolist()
    answers = {name: side.ask(prompts, NEW)[1] for name, side in sides.items()}
    different = [
        name
        for name, tokens in answers.items()
        if name not in ("products", "two tokens") and tokens != answers["llmctl"]
    ]
    if equal and different:
        raise SystemExit(f"other tokens than ours from {', '.join(different)}: nothing was compared")
    decode: dict[str, list[float]] = {name: [] for name in sides}
    whole: dict[str, list[float]] = {name: [] for name in sides}
    speeds = []
    parts = np.array_split(memory(2**28 if device == "cpu" else 2**20), threads)
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds):
            speeds += [bandwidth(pool, parts) if device == "cpu" else device_bandwidth() for _ in range(3)]
            for name in list(sides)[:: -1 if number % 2 else 1]:
                first, _ = sides[name].ask(prompts, 1)
                seconds, _ = sides[name].ask(prompts, NEW)
                decode[name].append((NEW - 1) * batch / (seconds - first))
                whole[name].append(NEW * batch / seconds)
    return {
        "decode": {name: statistics.median(rates) for name, rates in decode.items()},
        "whole": {name: statistics.median(rates) for name, rates in whole.items()},
        "ratio": {name: ratio(decode["llmctl"], rates) for name, rates in decode.items()},
        "whole_ratio": {name: ratio(whole["llmctl"], rates) for name, rates in whole.items()},
        "bandwidth": {"median": statistics.median(speeds), "best": max(speeds)},
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of how many times as fast ours is, round by round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def work(side: str, directory: str, threads: str, device: str) -> None:
    """Be one of the sides of our own environment."""
    import runpy

    serve = runpy.run_path(str(HERE / "peers" / "decode.py"))["serve"]

    warnings.simplefilter("ignore")
    sides = runpy.run_path(str(HERE / "decode_sides.py"))["SIDES"]
    serve(sides[side](Path(directory), int(threads), device))


def main() -> None:
    """Print a table for each format and batch, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="interpreter of the peers' environment")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="82m")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, help="by default fp32 and int4, on CUDA fp16, which alone it takes"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each side")
    wanted = "int4: weights that share a scale; 0: the stage's default, 32. Those of 128 are as many bits as Q4_0's"
    parser.add_argument("--block", type=int, default=128, help=wanted)
    parser.add_argument("--symmetric", action="store_true", help="int4: no zero points")
    parser.add_argument("--home", type=Path, help="where the exports are kept; a temporary directory by default")
    args = parser.parse_args()
    formats = args.formats or (["fp32", "int4"] if args.device == "cpu" else ["fp16"])
    if args.device == "cuda" and formats != ["fp16"]:
        parser.error("attention with a cache is in half precision on CUDA: --formats fp16")
    with contextlib.ExitStack() as stack:
        home = args.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            peers = args.peers if set(formats) != {"fp16"} else None
            prepare(home, peers, args.block, args.symmetric, SHAPES[args.shape], formats)
        numbers = numbers_per_token(home / "hf")
        print(f"prompt {PROMPT}, {NEW} new tokens, {args.threads} threads, {args.rounds} interleaved rounds, medians")
        for kind in formats:
            sides = start(home, kind, args.threads, args.peers, args.device)
            for batch in args.batches:
                vocabulary = SHAPES[args.shape]["vocab_size"]
                found = compare(sides, batch, args.rounds, args.threads, kind == "fp32", vocabulary, args.device)
                report(kind, batch, found, {"fp32": 4, "fp16": 2}.get(kind, 0) * numbers)
            for side in sides.values():
                side.end()


def report(kind: str, batch: int, found: dict[str, Any], size: int) -> None:
    """Print what was found; `size`: bytes of weights that a step reads, 0 where they are packed."""
    print(f"\n{kind}, batch {batch}: decoding alone; in brackets with the prompt")
    for name in found["decode"]:
        print(
            f"  {name:17} {found['decode'][name]:8.1f} ({found['whole'][name]:.1f}) tokens/s   "
            f"llmctl is {found['ratio'][name]:.2f} ({found['whole_ratio'][name]:.2f}) times as fast"
        )
    speed = found["bandwidth"]
    print(f"  memory is read at {speed['median'] / 1e9:.1f} GB/s (best {speed['best'] / 1e9:.1f})", end="")
    if size and batch == 1:
        read = size * found["decode"]["llmctl"]
        found["roofline"] = read / speed["median"]
        print(f"; llmctl reads {read / 1e9:.1f} GB/s of weights: {found['roofline']:.0%} of it", end="")
    print(flush=True)
    print(json.dumps({"benchmark": "decode", "format": kind, "batch": batch, "machine": platform.machine(), **found}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main()
