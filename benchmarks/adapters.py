"""What unmerged LoRA adapters cost while decoding: a bundle that has them beside the same model's plain bundle.

A LLaMA with random weights (by default the 82M one: 12 layers, width 768, vocabulary 8192) is exported plain and with
random adapters of all its linear layers; with `--bits` both are quantized. The engine answers a batch of prompts of 64
tokens; timed are the steps in which all rows run. Cases take turns; printed is the median over the rounds of the
tokens per second, and of their ratio to the plain bundle in the same round. Then requests for all the adapters come and
go while the others run, their prompts read in between. What is made stays in `--home`, if given.

    python benchmarks/adapters.py --threads 2 --rounds 5 --bits 4
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmctl import Artifact
from llmctl.engine import EngineOptions, Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator, open_bundle
from llmctl.testing import run_stage

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY, PROMPT = 8192, 64


def write_model(home: Path, dim: int, layers: int) -> Path:
    """A model with random weights, as transformers writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=dim,
        intermediate_size=dim * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        num_key_value_heads=max(1, dim // 192),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(home / "hf")
    return home / "hf"


def write_adapter(path: Path, base: Path, rank: int, seed: int) -> Path:
    """A random adapter of all linear layers, as peft writes it."""
    from safetensors.numpy import load_file, save_file

    random, tensors = np.random.default_rng(seed), {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(LINEAR):
            for side, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                values = random.standard_normal(shape, np.float32) * np.float32(0.02)
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return path


def bundles(home: Path, args: argparse.Namespace) -> tuple[OrtGenerator, OrtGenerator]:
    """The plain bundle and the one with adapters, opened."""
    from llmctl_export_onnx import EXPORT_ONNX
    from llmctl_quantize import QUANTIZE

    made = [home / f"{name}{args.bits or ''}" / "model" for name in ("plain", "adapted")]
    if all(path.is_dir() for path in made):
        return open_bundle(made[0], "cpu", args.threads), open_bundle(made[1], "cpu", args.threads)
    source = write_model(home, args.dim, args.layers)
    adapters = [write_adapter(home / f"a{seed}", source, args.rank, seed) for seed in range(args.adapters)]
    for name, beside in (("plain", []), ("adapted", adapters)):
        given = [Artifact(path, "model.adapter") for path in beside]
        params = {"parity_prompts": 1, "threads": args.threads}
        model = Artifact(source, "model.hf")
        bundle = run_stage(EXPORT_ONNX, home / name, params, model=model, adapters=given).outputs["model"]
        if args.bits:
            params = {"bits": args.bits, "threads": args.threads, "speed_rounds": 1}
            run_stage(QUANTIZE, home / f"{name}{args.bits}", params, model=bundle)
    return open_bundle(made[0], "cpu", args.threads), open_bundle(made[1], "cpu", args.threads)


def speed(generator: OrtGenerator, batch: int, adapters: Sequence[str | None], new: int) -> float:
    """Tokens per second while `batch` rows run, which have the adapters in turn."""
    random = np.random.default_rng(0)
    engine = generator.engine(EngineOptions(slots=batch, max_queue=batch, prefix_cache=False, context=PROMPT + new))
    sampling = Sampling(max_new_tokens=new, logit_bias=tuple((end, -1e9) for end in generator.eos_ids))
    for row in range(batch):
        prompt = random.integers(3, VOCABULARY, PROMPT).tolist()
        engine.submit(Request(prompt=prompt, sampling=sampling, adapter=adapters[row % len(adapters)]))
    while engine.stats().running < batch:
        engine.step()
    before, start = engine.stats().generated_tokens, time.perf_counter()
    while engine.stats().running == batch:
        engine.step()
    seconds, after = time.perf_counter() - start, engine.stats().generated_tokens
    engine.close()
    return (after - before) / seconds


def turnover(generator: OrtGenerator, batch: int, adapters: Sequence[str | None], new: int) -> float:
    """Tokens per second of requests that come and go: each has one of the adapters, and 1 to `2 * new` tokens."""
    random = np.random.default_rng(0)
    count, context = 5 * batch, PROMPT + 2 * new
    engine = generator.engine(EngineOptions(slots=batch, max_queue=count, prefix_cache=False, context=context))
    bias = tuple((end, -1e9) for end in generator.eos_ids)
    for client in range(count):
        sampling = Sampling(max_new_tokens=int(random.integers(1, 2 * new + 1)), logit_bias=bias)
        prompt, name = random.integers(3, VOCABULARY, 8).tolist(), adapters[random.integers(len(adapters))]
        engine.submit(Request(prompt=prompt, sampling=sampling, adapter=name, client=str(client)))
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    seconds, tokens = time.perf_counter() - start, engine.stats().generated_tokens
    engine.close()
    return tokens / seconds


def main() -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--bits", type=int, default=0, choices=[0, 4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        plain, adapted = bundles(args.home or Path(home), args)
        names = adapted.adapter_names
        found = []
        for batch in args.batch:
            cases = {"plain": (plain, [None]), "without adapter": (adapted, [None]), "one": (adapted, names[:1])}
            if batch > 1:
                cases |= {"model and two": (adapted, [None, *names[:2]]), f"all {len(names)}": (adapted, names)}
            rounds = [{name: speed(*who, args.new) for name, who in turn(cases, batch)} for _ in range(args.rounds)]
            for name in cases:
                value = statistics.median(one[name] for one in rounds)
                ratio = statistics.median(one[name] / one["plain"] for one in rounds)
                print(f"batch {batch:2} {name:16} {value:8.1f} tokens/s, {ratio:.3f} of plain")
                found.append({"batch": batch, "case": name, "tokens_per_s": value, "ratio": ratio})
            if batch > 1:
                value = statistics.median(turnover(adapted, batch, names, args.new) for _ in range(args.rounds))
                print(f"batch {batch:2} coming and going {value:8.1f} tokens/s")
                found.append({"batch": batch, "case": "coming and going", "tokens_per_s": value})
    print(json.dumps({"benchmark": "adapters", "machine": platform.machine(), "bits": args.bits, "cases": found}))


def turn(
    cases: dict[str, tuple[OrtGenerator, Sequence[str | None]]], batch: int
) -> list[tuple[str, tuple[OrtGenerator, int, Sequence[str | None]]]]:
    """The arguments of `speed` for every case of one round."""
    return [(name, (generator, batch, adapters)) for name, (generator, adapters) in cases.items()]


if __name__ == "__main__":
    main()
