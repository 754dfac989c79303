"""The small pre-training anchor: what a recipe of `train-pretrain` reaches in 300 steps, through the shipped stages.

    python benchmarks/anchor.py --recipe speedrun --seeds 0 1 2
    python benchmarks/anchor.py --recipe default
    python benchmarks/anchor.py --recipe adamw                        a control, which must end above
    python benchmarks/anchor.py --recipe reference                    the same from transformers' fresh weights

Corpus: the top-level modules of the Python that runs this, in the order of their names, the last 12 for validation.
Byte-level BPE of 1024 tokens (and llmctl's six special ones), rows of 128 tokens, 16 rows per step, 300 steps, 4 layers
of width 128. `val_nats` is the mean loss of 5 x 16 windows of 128 tokens whose starts are drawn uniformly with seed 1,
whatever the seed of the training; documents are read on end, without marks between them. The loss over the whole
validation split stands beside it.

Anything after `--` goes to train-pretrain as it is, to try a change: `-- --lr 0.03`. The last line is
`val_nats MEAN ± SPREAD`, the spread that of the largest and the smallest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

VALIDATION = 12
VOCABULARY = 1024
SPECIAL = 6
"""Tokens that llmctl's tokenizers have beside the 1024, so that text is cut as without them."""
CONTEXT = 128
WINDOWS = (5, 16)
SPEEDRUN = Path(__file__).parent.parent / "specs" / "speedrun.yaml"
FIXED = ("seed", "max_steps", "batch_size", "context")
LLAMA = ["--preset", "llama", "--dim", "128", "--layers", "4", "--heads", "4", "--kv-heads", "4", "--ff-dim", "352"]
QWEN3 = ["--preset", "qwen3", *LLAMA[2:]]
ADAMW = ["--optimizer", "adamw", "--lr", "3e-3", "--weight-decay", "0.1"]
RECIPES = {"default": LLAMA, "default-qwen3": QWEN3, "adamw": [*LLAMA, *ADAMW]}


def flags(recipe: str, directory: Path, seed: int = 0) -> list[str]:
    """What train-pretrain is given for `recipe`; that of `speedrun` is what its spec says."""
    if recipe in RECIPES:
        return RECIPES[recipe]
    if recipe == "reference":
        return ["--model", str(fresh_llama(directory / f"llama-{seed}", seed)), *ADAMW]
    stage = yaml.safe_load(SPEEDRUN.read_text(encoding="utf-8"))["stages"]["train"]["with"]
    own = {name: value for name, value in stage.items() if name not in FIXED}
    path = directory / "speedrun.yaml"
    path.write_text(
        yaml.safe_dump({"llmctl": 1, "name": "speedrun", "uses": "train-pretrain", "with": own}), encoding="utf-8"
    )
    return ["--config", str(path)]


def fresh_llama(directory: Path, seed: int) -> Path:
    """The shape of `LLAMA` with the weights that transformers draws."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": True}
    limits = {"vocab_size": VOCABULARY + SPECIAL, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5}
    LlamaForCausalLM(LlamaConfig(**shape, **special, **limits)).save_pretrained(directory)
    return directory


def write_corpus(directory: Path) -> str:
    """Write the two splits; the first digits of the corpus's hash."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    directory.mkdir()
    digest = hashlib.sha256()
    for split, part in (("train", files[:-VALIDATION]), ("validation", files[-VALIDATION:])):
        with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
            for file in part:
                text = file.read_text(encoding="utf-8")
                digest.update(text.encode())
                lines.write(json.dumps({"id": file.name, "source": str(file), "text": text}) + "\n")
    return digest.hexdigest()[:12]


def llmctl(directory: Path, *arguments: str) -> dict[str, Path]:
    """Run one stage in `directory`; its outputs by name."""
    command = [sys.executable, "-m", "llmctl", *arguments, "--format", "json"]
    done = subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["port"]: Path(line["path"]) for line in lines if line["llmctl"] == "ref"}


def train(
    directory: Path, made: dict[str, Path], recipe: str, seed: int, steps: int, further: Sequence[str]
) -> dict[str, float]:
    """Train one model with the stage on what `tokenize` made, and measure it."""
    shape = ["--context", str(CONTEXT), "--batch-size", "16", "--max-steps", str(steps), "--seed", str(seed)]
    running = ["--device", "cpu", "--threads", "1", "--save-every", "0", "--eval-batches", "100000"]
    running += ["--no-document-mask"]
    inputs = ["--tokens", str(made["tokens"]), "--tokenizer", str(made["tokenizer"])]
    out = llmctl(directory, "train-pretrain", *inputs, *flags(recipe, directory, seed), *shape, *running, *further)
    found = json.loads((out["metrics"] / "metrics.json").read_text(encoding="utf-8"))
    nats = window_loss(out["model"], made["tokens"])
    names = ("loss.validation", "bpb.validation", "parameters", "tokens_per_s")
    return {"val_nats": nats, **{name: found[name] for name in names}}


def window_loss(model: Path, tokens: Path) -> float:
    """The mean loss of the windows, by the saved model."""
    import torch

    from llmctl.nn.hf import load_model
    from llmctl.text.shards import TokenShards

    ids = torch.from_numpy(TokenShards.open(tokens).split("validation").tokens[:].astype("int64"))
    ids = ids[ids >= SPECIAL]
    generator = torch.Generator().manual_seed(1)
    net, total = load_model(model).eval(), 0.0
    batches, rows = WINDOWS
    with torch.inference_mode():
        for _ in range(batches):
            starts = torch.randint(len(ids) - CONTEXT - 1, (rows,), generator=generator)
            window = torch.stack([ids[start : start + CONTEXT + 1] for start in starts.tolist()])
            total += float(torch.nn.functional.cross_entropy(net(window[:, :-1]).mT, window[:, 1:]))
    return total / batches


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per seed, and the mean."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    further = given[given.index("--") + 1 :] if "--" in given else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=["speedrun", *RECIPES, "reference"], default="speedrun")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(given[: len(given) - len(further) - ("--" in given)])
    found = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        digest = write_corpus(directory / "text")
        made = llmctl(directory, "tokenize", "--text", "text", "--vocab-size", str(VOCABULARY + SPECIAL))
        print(f"Python {platform.python_version()}, corpus {digest}, recipe {options.recipe}, {options.steps} steps")
        for seed in options.seeds:
            row = train(directory, made, options.recipe, seed, options.steps, further)
            found.append(row["val_nats"])
            print(
                f"seed {seed}: val_nats {row['val_nats']:.3f}, whole split {row['loss.validation']:.3f} nats "
                f"{row['bpb.validation']:.3f} bits per byte, {row['parameters']:.0f} parameters, "
                f"{row['tokens_per_s']:.0f} tokens/s",
                flush=True,
            )
    spread = max(found) - min(found) if len(found) > 1 else math.nan
    print(f"val_nats {statistics.mean(found):.3f} ± {spread:.3f}")


if __name__ == "__main__":
    main()
