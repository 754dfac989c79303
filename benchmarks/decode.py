"""Single-stream fp32 decoding: `llmctl.ort` against `optimum.onnxruntime`, same weights, interleaved in one run.

An 82M LLaMA (12 layers, width 768, 12 query and 4 key/value heads, vocabulary 8192) with random weights answers a
prompt of 64 tokens with 128 new ones, greedily. Each side has its own export of the same directory: ours by the stage
`export-onnx`, the other by `optimum.exporters.onnx.main_export`, run by `ORTModelForCausalLM.generate`. Both have the
same number of ONNX Runtime threads; the token ids must be equal. Besides wall time, CPU time is taken: with one thread
it says the same on a busy machine as on a quiet one.

    python benchmarks/decode.py --threads 2 --rounds 9
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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

Answer = Callable[[list[int]], list[int]]


def prepare(home: Path) -> tuple[Path, Path]:
    """Make the model and both exports below `home`, once; their directories."""
    source, ours, theirs = home / "hf", home / "ours", home / "optimum"
    if not (theirs / "model.onnx").is_file():
        import torch
        from optimum.exporters.onnx import main_export
        from transformers import LlamaConfig, LlamaForCausalLM

        from llmctl import Artifact
        from llmctl.testing import run_stage
        from llmctl_export_onnx import EXPORT_ONNX

        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=1, pad_token_id=2)).save_pretrained(source)
        run_stage(EXPORT_ONNX, ours, {"parity_prompts": 2}, model=Artifact(source, "model.hf"))
        main_export(str(source), theirs, task="text-generation-with-past", do_validation=False)
    return ours / "model", theirs


def llmctl_answers(bundle: Path, threads: int) -> Answer:
    """Our engine."""
    from llmctl.generator import Sampling
    from llmctl.ort import open_bundle

    generator = open_bundle(bundle, "cpu", threads)
    generator.eos_ids = frozenset()  # both sides make all tokens
    sampling = Sampling(max_new_tokens=NEW)
    return lambda prompt: list(generator.stream(prompt, sampling))


def optimum_answers(directory: Path, threads: int) -> Answer:
    """`ORTModelForCausalLM.generate` with its KV cache and I/O binding, as it is by default."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    torch.set_num_threads(threads)
    model = ORTModelForCausalLM.from_pretrained(directory, session_options=options, provider="CPUExecutionProvider")

    def answer(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out: Any = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return [int(token) for token in out[0, len(prompt) :]]

    return answer


def compare(sides: dict[str, Answer], rounds: int) -> dict[str, Any]:
    """Time all sides in turn, after a warm-up that also checks that they give the same tokens."""
    prompt = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], PROMPT).tolist()
    answers = {name: answer(prompt) for name, answer in sides.items()}
    first = next(iter(answers.values()))
    if any(tokens != first for tokens in answers.values()):
        raise SystemExit("the two sides give different tokens: nothing was compared")
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, answer in sides.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            answer(prompt)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return {
        "tokens_per_s": {name: round(NEW / statistics.median(times), 2) for name, times in wall.items()},
        "ratio": ratio(wall),
        "ratio_cpu": ratio(cpu),
        "wall_s": {name: [round(s, 3) for s in times] for name, times in wall.items()},
        "cpu_s": {name: [round(s, 3) for s in times] for name, times in cpu.items()},
    }


def ratio(seconds: dict[str, list[float]]) -> float:
    """Median of how many times as long the second side took as the first, round by round."""
    ours, theirs = seconds.values()
    return round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3)


def main() -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="ONNX Runtime threads of each side")
    parser.add_argument("--home", type=Path, help="where the exports are kept; a temporary directory by default")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = args.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            ours, theirs = prepare(home)
            sides = {
                "llmctl": llmctl_answers(ours, args.threads),
                "optimum": optimum_answers(theirs, args.threads),
            }
            found = compare(sides, args.rounds)
    print(f"prompt {PROMPT}, {NEW} new tokens, {args.threads} threads, median of {args.rounds} interleaved rounds")
    for name, rate in found["tokens_per_s"].items():
        print(f"  {name:8} {rate:8.2f} tokens/s")
    print(f"  llmctl is {found['ratio']:.2f}x as fast (CPU time: {found['ratio_cpu']:.2f}x)")
    print(json.dumps({"benchmark": "decode", "threads": args.threads, "machine": platform.machine(), **found}))


if __name__ == "__main__":
    main()
