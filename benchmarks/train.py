"""Training speed: the stage `train-pretrain` against `transformers.Trainer` and `litgpt pretrain`, in turns.

The same LLaMA shapes, tokens per step, optimizer (AdamW), clipping and precision; every trainer is its own shipped loop
with its logging, in its own process, and trains some steps when its turn comes. The peers have an environment of their
own, as they need other versions of what we need, too:

    python -m venv peers
    peers/bin/pip install torch==2.13.0 litgpt==0.5.13 transformers==4.57.6 accelerate==1.15.0
    python benchmarks/train.py --peers peers/bin/python [--shapes 4x128 12x768] [--threads 2] [--rounds 7]
    python benchmarks/train.py --peers peers/bin/python --shapes speedrun --nanochat CHECKOUT

The shape `speedrun` is nanochat's architecture, which the preset of that name is ours of, with Muon; its peer is the
loop of a checkout of nanochat.

Prints per shape the median tokens per second of each side, and the median over the rounds of the ratios to it, once as
Python runs it and once with torch.compile on all sides, which is litgpt's default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, Any]] = {
    "4x128": {"layers": 4, "dim": 128, "heads": 4, "ff_dim": 352, "context": 128, "batch": 16, "vocabulary": 1024},
    "12x768": {"layers": 12, "dim": 768, "heads": 12, "ff_dim": 2048, "context": 256, "batch": 4, "vocabulary": 8192},
    "speedrun": {"layers": 4, "dim": 128, "heads": 2, "ff_dim": 512, "context": 128, "batch": 16, "vocabulary": 1024},
    "tiny": {"layers": 2, "dim": 32, "heads": 2, "ff_dim": 96, "context": 32, "batch": 4, "vocabulary": 512},
}
STEPS = {"4x128": 20, "speedrun": 20, "12x768": 2, "tiny": 2}
"""Steps of a round."""
WARMUP = {"4x128": 10, "speedrun": 10, "12x768": 3, "tiny": 2}


Sides = dict[str, "Trainer"]


class Trainer:
    """A trainer's process, held until its turn comes."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        self.answer()  # the warm-up

    def answer(self) -> dict[str, float]:
        """What the process says of its round, when it is done."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}\nended with {self.process.wait()}:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def round(self) -> dict[str, float]:
        """Train one round."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Let the process go."""
        self.process.communicate()


def prepare(directory: Path, vocabulary: int) -> None:
    """The standard library's tokens and tokenizer below `directory`; the peers read the same from `tokens.npy`."""
    import numpy as np

    from llmctl.testing import run_stage
    from llmctl.text.shards import TokenShards
    from llmctl_data import DATA
    from llmctl_tokenize import TOKENIZE

    data = run_stage(DATA, directory / "data", {"reader": "python-stdlib"}).outputs["text"]
    made = run_stage(TOKENIZE, directory / "tokenize", {"vocab_size": vocabulary}, text=data).outputs
    np.save(directory / "tokens.npy", np.asarray(TokenShards.open(made["tokens"].path).split("train").tokens))


def ours(directory: Path, shape: dict[str, Any]) -> None:
    """The stage `train-pretrain` as it is shipped; rows as the peers have them, that is without regard to documents."""
    from llmctl import Artifact
    from llmctl.testing import run_stage
    from llmctl_train_pretrain import TRAIN_PRETRAIN

    params = {
        **(recipe() if shape["preset"] == "speedrun" else llama(shape)),
        **{name: shape[name] for name in ("layers", "dim", "heads", "ff_dim", "context")},
        "batch_size": shape["batch"],
        "packing": shape["packing"],
        "document_mask": shape["packing"] != "crop",
        "max_steps": 10**6,
        "save_every": 0,
        "precision": shape["precision"],
        "device": shape["device"],
        "threads": shape["threads"],
        "compile": shape["compile"],
    }
    inputs = {name: Artifact(directory / "tokenize" / name, kind) for name, kind in KINDS.items()}
    run_stage(TRAIN_PRETRAIN, Path(tempfile.mkdtemp(dir=directory)), params, **inputs)


def llama(shape: dict[str, Any]) -> dict[str, Any]:
    """What the peers' LLaMA is trained with."""
    rates = {name: shape["lr"] for name in ("lr", "embedding_lr", "head_lr", "vector_lr")}
    return {"preset": "llama", "tie_embeddings": False, "norm_eps": 1e-5, "optimizer": "adamw", "beta2": 0.95, **rates}


def recipe() -> dict[str, Any]:
    """The parameters of `specs/speedrun.yaml`."""
    import yaml

    spec = yaml.safe_load((HERE.parent / "specs" / "speedrun.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = spec["stages"]["train"]["with"]
    return {name: value for name, value in found.items() if name != "seed"}


KINDS = {"tokens": "dataset.tokens", "tokenizer": "tokenizer"}


def work(arguments: list[str]) -> None:
    """Be our side in a process of its own."""
    sys.path.insert(0, str(HERE / "peers"))
    from pacing import Pace

    directory, shape = Path(arguments[0]), json.loads(arguments[1])
    Pace(shape["warmup"], shape["steps"])
    ours(directory, shape)


def start(side: str, directory: Path, shape: dict[str, Any], peers: str | None) -> Trainer:
    """The process of a side."""
    if side == "llmctl":
        command = [sys.executable, str(HERE / "train.py"), "--work"]
    else:
        assert peers is not None
        command = [peers, str(HERE / "peers" / "train.py"), side]
    return Trainer([*command, str(directory), json.dumps(shape)], directory / f"{side}.log")


def compare(name: str, sides: Sides, tokens: int, rounds: int) -> None:
    """Let the sides take turns, the order turned round every time, and print a table."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            found[side].append(sides[side].round())
    print(f"\n{name}")
    for side, rows in found.items():
        speed = tokens / statistics.median(row["seconds"] for row in rows)
        ratios = {
            what: statistics.median(
                theirs[what] / mine[what] for mine, theirs in zip(found["llmctl"], rows, strict=True)
            )
            for what in ("seconds", "cpu_seconds")
        }
        print(
            f"  {side:8} {speed:10.0f} tokens/s   llmctl is {ratios['seconds']:.2f} times as fast, "
            f"takes 1/{ratios['cpu_seconds']:.2f} of the CPU time",
            flush=True,
        )


def main() -> None:
    """Parse, prepare, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="interpreter of the peers' environment; without it only our own speed is shown")
    parser.add_argument("--sides", nargs="+", default=["trainer", "litgpt"], choices=["trainer", "litgpt"])
    parser.add_argument("--nanochat", help="its checkout, for the shape speedrun")
    parser.add_argument("--shapes", nargs="+", default=["4x128", "12x768"], choices=list(SHAPES))
    parser.add_argument("--compile", nargs="+", type=int, default=[0, 1], choices=[0, 1], help="1: with torch.compile")
    parser.add_argument("--packing", default="crop", choices=["crop", "documents", "best-fit"], help="ours")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if "speedrun" in options.shapes and options.peers and not options.nanochat:
        parser.error("the shape speedrun has nanochat beside it: give --nanochat CHECKOUT, or no --peers")
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.shapes:
            directory = Path(temporary, name)
            directory.mkdir()
            prepare(directory, SHAPES[name]["vocabulary"])
            for compiled in options.compile:
                shape = {
                    **SHAPES[name],
                    "steps": STEPS[name],
                    "warmup": WARMUP[name],
                    "compile": bool(compiled),
                    "lr": 1e-3,
                }
                shape |= {key: getattr(options, key) for key in ("threads", "packing", "precision", "device")}
                shape |= {"nanochat": options.nanochat, "preset": "speedrun" if name == "speedrun" else "llama"}
                others = ["nanochat"] if name == "speedrun" else options.sides
                wanted = ["llmctl", *(others if options.peers else [])]
                sides = {side: start(side, directory, shape, options.peers) for side in wanted}
                tokens = shape["steps"] * shape["batch"] * shape["context"]
                compare(name + (", compiled" if compiled else ""), sides, tokens, options.rounds)
                for side in sides.values():
                    side.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        main()
