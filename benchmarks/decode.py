"""Decoding on the CPU: our engine beside its peers on the same weights, in turns, and beside what the memory can give.

An 82M LLaMA (12 layers, width 768, 12 query and 4 key/value heads, vocabulary 8192) with random weights answers
prompts of 64 tokens with 128 new ones, greedily, in float32 and in 4 bits. Our side runs the bundles of `export-onnx`
and `quantize`; Optimum its own export; onnxruntime-genai our bundles and, in 4 bits, what its own builder makes of the
weights; llama.cpp GGUF files of the same weights, F32 and Q4_0. `products` is a graph of nothing but our bundle's
matrix products: no engine that runs these kernels can be faster than they are. Each side is a process that waits while
another works. In every round each side answers with one token and with
all: the difference is decoding without the prompt. Ratios are taken round by round, then their median. In float32 all
sides must give the same tokens. `--peers` is the interpreter of an environment with what
`benchmarks/peers/decode.py` names; without it only Optimum is beside us.

    python benchmarks/decode.py --peers peers/bin/python --threads 2 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
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

FORMATS = ("fp32", "int4")


def prepare(home: Path, peers: str | None, block: int, symmetric: bool) -> None:
    """Make the model and every side's files below `home`, once."""
    from llmctl import Artifact
    from llmctl.testing import run_stage

    source = home / "hf"
    if not (source / "config.json").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        # An end that no prompt of these reaches: all sides make all tokens.
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
        LlamaForCausalLM(LlamaConfig(**SHAPE, **ids)).save_pretrained(source)
    if not (home / "fp32" / "model" / "model.onnx").is_file():
        from llmctl_export_onnx import EXPORT_ONNX

        run_stage(EXPORT_ONNX, home / "fp32", {"parity_prompts": 2}, model=Artifact(source, "model.hf"))
    if not (home / "int4" / "model" / "model.onnx").is_file():
        from llmctl_quantize import QUANTIZE

        # How codes are chosen changes nothing about speed; `rtn` is done sooner.
        params = {"bits": 4, "method": "rtn", "block_size": block, "symmetric": symmetric, "speed_rounds": 1}
        run_stage(QUANTIZE, home / "int4", params, model=Artifact(home / "fp32" / "model", "model.onnx"))
    if not (home / "optimum" / "model.onnx").is_file():
        from optimum.exporters.onnx import main_export

        main_export(str(source), home / "optimum", task="text-generation-with-past", do_validation=False)
    if peers and not (home / "int4.gguf").is_file():
        subprocess.run([peers, HERE / "peers" / "decode.py", "convert", source, home], check=True)
    if peers and not (home / "genai" / "genai_config.json").is_file():
        subprocess.run([peers, HERE / "peers" / "decode.py", "build", source, home / "genai"], check=True)


def llmctl_answers(bundle: Path, threads: int) -> Any:
    """Our engine."""
    from llmctl.generator import Sampling
    from llmctl.ort import open_bundle

    generator = open_bundle(bundle, "cpu", threads)
    generator.eos_ids = frozenset()

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=new)
        if len(prompts) == 1:
            return [list(generator.stream(prompts[0], sampling))]
        return generator.generate(prompts, sampling)

    return answer


def products_answers(bundle: Path, threads: int) -> Any:
    """The matrix products of a step alone, as often as an answer has steps behind its prompt; the tokens are zeros."""
    import onnx
    from onnx import helper

    from llmctl.ort.sessions import open_session

    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, widths = [], {}
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "MatMul", "FusedMatMul") or node.input[1] not in stored:
            continue
        sizes = {item.name: item.i for item in node.attribute}
        shape = stored[node.input[1]].dims[:: -1 if sizes.get("transB") else 1]
        inner, outer = (sizes["K"], sizes["N"]) if node.op_type == "MatMulNBits" else shape
        node.input[0], node.output[0] = f"of {inner}", f"product {len(nodes)}"
        widths[node.input[0]], widths[node.output[0]] = inner, outer
        nodes.append(node)
    values = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", width])
        for name, width in widths.items()
    }
    del model.graph.node[:], model.graph.input[:], model.graph.output[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(value for name, value in values.items() if name.startswith("of"))
    model.graph.output.extend(value for name, value in values.items() if name.startswith("product"))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    file = bundle / "products.onnx"  # beside the weights that it refers to
    onnx.save(model, file)
    session = open_session(file, "cpu", threads)
    file.unlink()
    bound: dict[int, Any] = {}

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        if len(prompts) not in bound:
            binding = session.io_binding()
            arrays = {name: np.ones((len(prompts), width), np.float32) for name, width in widths.items()}
            for name, array in arrays.items():
                bind = binding.bind_input if name.startswith("of") else binding.bind_output
                bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            bound[len(prompts)] = binding, arrays
        for _ in range(new - 1):
            session.run_with_iobinding(bound[len(prompts)][0])
        return [[0] * new for _ in prompts]

    return answer


def optimum_answers(directory: Path, threads: int) -> Any:
    """`ORTModelForCausalLM.generate` with its KV cache and I/O binding, as it is by default."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    torch.set_num_threads(threads)
    model = ORTModelForCausalLM.from_pretrained(directory, session_options=options, provider="CPUExecutionProvider")

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        made: Any = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return made[:, len(prompts[0]) :].tolist()  # type: ignore[no-any-return]

    return answer


class Side:
    """A process that answers when asked."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
            )

    def ask(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds that the answers took, and the answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended early: {self.log.read_text()[-2000:]}")
        found = json.loads(line)
        return found["seconds"], found["tokens"]

    def end(self) -> None:
        """Let the process go."""
        self.process.communicate()


def start(home: Path, kind: str, threads: int, peers: str | None) -> dict[str, Side]:
    """The sides that compute in the format `kind`."""
    ours = [sys.executable, str(HERE / "decode.py"), "--work"]
    commands = {name: [*ours, name, str(home / kind / "model"), str(threads)] for name in ("llmctl", "products")}
    if kind == "fp32":
        commands["optimum"] = [*ours, "optimum", str(home / "optimum"), str(threads)]
    if peers:
        theirs = [peers, str(HERE / "peers" / "decode.py")]
        commands["genai"] = [*theirs, "genai", str(home / kind / "model"), str(threads)]
        if kind == "int4":
            commands["genai's own"] = [*theirs, "genai", str(home / "genai"), str(threads)]
        commands["llama.cpp"] = [*theirs, "llama.cpp", str(home / f"{kind}.gguf"), str(threads)]
    return {name: Side(command, home / f"{name}-{kind}.log") for name, command in commands.items()}


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


def bytes_per_token(source: Path) -> int:
    """What one float32 step reads of the weights: all but the embedding, of which it is one row."""
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", "np") as file:
        sizes = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    return 4 * sum(size for name, size in sizes.items() if "embed_tokens" not in name)


def compare(sides: dict[str, Side], batch: int, rounds: int, threads: int, equal: bool) -> dict[str, Any]:
    """Let the sides take turns, the order turned round every time."""
    prompts = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (batch, PROMPT)).tolist()
    answers = {name: side.ask(prompts, NEW)[1] for name, side in sides.items()}
    different = [name for name, tokens in answers.items() if name != "products" and tokens != answers["llmctl"]]
    if equal and different:
        raise SystemExit(f"other tokens than ours from {', '.join(different)}: nothing was compared")
    decode: dict[str, list[float]] = {name: [] for name in sides}
    whole: dict[str, list[float]] = {name: [] for name in sides}
    speeds = []
    parts = np.array_split(memory(2**28), threads)
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds):
            speeds += [bandwidth(pool, parts) for _ in range(3)]
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


def work(side: str, directory: str, threads: str) -> None:
    """Be one of the sides of our own environment."""
    import runpy

    serve = runpy.run_path(str(HERE / "peers" / "decode.py"))["serve"]

    warnings.simplefilter("ignore")
    sides = {"llmctl": llmctl_answers, "products": products_answers, "optimum": optimum_answers}
    serve(sides[side](Path(directory), int(threads)))


def main() -> None:
    """Print a table for each format and batch, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="interpreter of the peers' environment")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each side")
    parser.add_argument("--block", type=int, default=0, help="int4: weights that share a scale; 0: the stage's default")
    parser.add_argument("--symmetric", action="store_true", help="int4: no zero points")
    parser.add_argument("--home", type=Path, help="where the exports are kept; a temporary directory by default")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = args.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            prepare(home, args.peers, args.block, args.symmetric)
        size = bytes_per_token(home / "hf")
        print(f"prompt {PROMPT}, {NEW} new tokens, {args.threads} threads, {args.rounds} interleaved rounds, medians")
        for kind in args.formats:
            sides = start(home, kind, args.threads, args.peers)
            for batch in args.batches:
                found = compare(sides, batch, args.rounds, args.threads, kind == "fp32")
                report(kind, batch, found, size)
            for side in sides.values():
                side.end()


def report(kind: str, batch: int, found: dict[str, Any], size: int) -> None:
    """Print what was found."""
    print(f"\n{kind}, batch {batch}: decoding alone; in brackets with the prompt")
    for name in found["decode"]:
        print(
            f"  {name:11} {found['decode'][name]:8.1f} ({found['whole'][name]:.1f}) tokens/s   "
            f"llmctl is {found['ratio'][name]:.2f} ({found['whole_ratio'][name]:.2f}) times as fast"
        )
    speed = found["bandwidth"]
    print(f"  memory is read at {speed['median'] / 1e9:.1f} GB/s (best {speed['best'] / 1e9:.1f})", end="")
    if kind == "fp32" and batch == 1:
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
