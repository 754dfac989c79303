"""Speculative decoding at batch 1: tokens per second of the engine without, by prompt lookup, and by a draft model.

An 82M LLaMA (12 layers, width 768, vocabulary 8192) with random weights whose layers from the third on say little
(their output projections are scaled by `--quiet-layers`), and a draft that is its first two layers with the same
embeddings and head: so the draft is right often, as a trained one would be, at the cost that such shapes have. The
prompt is a passage of 32 tokens, repeated; random weights repeat themselves in the answer, too. Both are conditions in
which speculation is good; acceptance is printed with the speed. `--random-draft` has a draft that is never right: what
speculation costs where it is no use.

Sides take turns, round by round; the tokens must be equal but where the two likeliest logits are nearer than 1e-4.

    python benchmarks/speculation.py --threads 2 --rounds 7
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from llmctl.engine import EngineOptions, Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator, open_bundle

PASSAGE, PROMPT, NEW = 32, 128, 128
DRAFT_LAYERS = 2
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


def prepare(home: Path, quiet: float) -> dict[str, Path]:
    """Make the model, its draft and one that knows nothing below `home`, once; the bundles."""
    names = ("model", "draft", "random")
    found = {name: home / f"{name}-onnx" / "model" for name in names}
    if all((path / "model.onnx").is_file() for path in found.values()):
        return found
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmctl import Artifact
    from llmctl.testing import run_stage
    from llmctl_export_onnx import EXPORT_ONNX

    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **ids))
    small = LlamaConfig(**{**SHAPE, "num_hidden_layers": DRAFT_LAYERS}, **ids)
    draft, other = LlamaForCausalLM(small), LlamaForCausalLM(small)
    with torch.no_grad():
        for layer in model.model.layers[DRAFT_LAYERS:]:
            layer.self_attn.o_proj.weight *= quiet
            layer.mlp.down_proj.weight *= quiet
    own = model.state_dict()
    draft.load_state_dict({name: own[name] for name in draft.state_dict()})
    for name, one in zip(names, (model, draft, other), strict=True):
        one.save_pretrained(home / name)
        artifact = Artifact(home / name, "model.hf")
        run_stage(EXPORT_ONNX, home / f"{name}-onnx", {"parity_prompts": 2}, model=artifact)
    return found


class Side:
    """One way to answer, with its engine."""

    def __init__(self, generator: OrtGenerator, options: dict[str, object]) -> None:
        context = PROMPT + NEW
        self.engine = generator.engine(
            EngineOptions(slots=1, context=context, prefill_tokens=PROMPT, **options)  # type: ignore[arg-type]
        )
        self.seconds: list[float] = []

    def answer(self, prompt: list[int]) -> list[int]:
        """The tokens; the time from the first one on is added to `seconds`."""
        tokens: list[int] = []
        self.engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=NEW)))
        started = None
        while self.engine.busy:
            for event in self.engine.step():
                tokens += event.tokens
            started = started or time.perf_counter()
        assert started is not None
        self.seconds.append(time.perf_counter() - started)
        return tokens

    @property
    def acceptance(self) -> float | None:
        """Of all tokens that were proposed."""
        stats = self.engine.stats()
        return round(stats.accepted / stats.drafted, 3) if stats.drafted else None


def check(generator: OrtGenerator, prompt: list[int], plain: list[int], other: list[int], name: str) -> None:
    """Exit unless two answers are equal, or part at a step whose two likeliest logits are all but equal."""
    if plain == other:
        return
    at = next(i for i, (a, b) in enumerate(zip(plain, other, strict=True)) if a != b)
    top = np.sort(generator.answer_logits(prompt, plain)[at])[-2:]
    if top[1] - top[0] > 1e-4:
        raise SystemExit(f"{name} gives another token at step {at}, {top[1] - top[0]:.2e} apart: nothing was compared")


def compare(generator: OrtGenerator, sides: dict[str, Side], rounds: int) -> dict[str, dict[str, object]]:
    """Speed and acceptance of every side; the first is what the others are compared with."""
    random = np.random.default_rng(0)
    names = list(sides)
    for number in range(rounds + 1):  # the first round warms up
        passage = random.integers(3, generator.vocab_size, PASSAGE).tolist()
        prompt = (passage * (PROMPT // PASSAGE))[:PROMPT]
        order = names if number % 2 else names[::-1]
        answers = {name: sides[name].answer(prompt) for name in order}
        for name in names[1:]:
            check(generator, prompt, answers[names[0]], answers[name], name)
    plain = sides[names[0]].seconds[1:]
    return {
        name: {
            "tokens_per_s": round((NEW - 1) / statistics.median(side.seconds[1:]), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(plain, side.seconds[1:], strict=True)), 3),
            "acceptance": side.acceptance,
        }
        for name, side in sides.items()
    }


def main() -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--quiet-layers", type=float, default=0.1, help="how loud the layers are that the draft lacks")
    parser.add_argument("--random-draft", action="store_true", help="compare with a draft that is never right, too")
    parser.add_argument("--home", type=Path, help="where the exports are kept; a temporary directory by default")
    parser.add_argument("--prepare", action="store_true", help="make the exports and measure nothing")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = args.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paths = prepare(home, args.quiet_layers)
        if args.prepare:
            return
        model, draft, other = (open_bundle(path, "cpu", args.threads) for path in paths.values())
        for one in (model, draft, other):
            one.eos_ids = frozenset()  # every answer goes on to its limit
        kinds: dict[str, dict[str, object]] = {
            "none": {},
            "prompt-lookup": {"speculation": "prompt-lookup", "draft_tokens": args.draft_tokens},
            "draft": {"speculation": "draft", "draft": draft, "draft_tokens": args.draft_tokens},
        }
        if args.random_draft:
            kinds["random draft"] = {**kinds["draft"], "draft": other}
        found = compare(model, {name: Side(model, options) for name, options in kinds.items()}, args.rounds)
    for name, one in found.items():
        print(f"{name:14} {one['tokens_per_s']:8} tokens/s  ratio {one['ratio']:<6} acceptance {one['acceptance']}")
    print(json.dumps({"benchmark": "speculation", "machine": platform.machine(), "sides": found}))


if __name__ == "__main__":
    main()
