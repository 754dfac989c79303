"""A tiny world that every trainer is run in: things with colours, told as text, asked for in conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmctl.registry import get_registry
from llmctl.stage import Artifact
from llmctl.testing import StageResult, run_stage
from llmctl.text.datasets import DatasetWriter

COLOURS = ("red", "green", "blue", "white")
THINGS = ("apple", "boat", "chair", "door", "engine", "flag", "glass", "house", "island", "jacket", "kite", "lamp")
COLOUR_OF = {thing: COLOURS[number * 7 % 4] for number, thing in enumerate(THINGS)}
SHAPE = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ff_dim": 64, "context": 48}
FAST = {"max_steps": 12, "batch_size": 4, "save_every": 5, "log_every": 4, "warmup_steps": 2, "threads": 1}

Trainer = Callable[..., StageResult]


@dataclass(frozen=True)
class World:
    text: Artifact
    chat: Artifact
    preference: Artifact
    tokenizer: Artifact
    tokens: Artifact
    model: Artifact


def write(directory: Path, kind: str, rows: dict[str, list[dict[str, Any]]]) -> Artifact:
    with DatasetWriter(directory, kind) as writer:
        for split, members in rows.items():
            for number, row in enumerate(members):
                writer.add(split, {"id": f"{split}-{number}", **row})
    return Artifact(directory, kind)


def ask(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def say(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.mktemp("world")
    told = [f"The {thing} is {colour}. Look at the {colour} {thing}!" for thing, colour in COLOUR_OF.items()]
    stories = [{"source": "", "text": " ".join(told[n : n + 1 + n % 4])} for n in range(len(told))]
    text = write(base / "text", "dataset.text", {"train": stories, "validation": stories[:3]})
    asked = {
        "train": [f"Which colour has the {thing}?" for thing in THINGS] + [f"Say {thing}'s colour" for thing in THINGS],
        "validation": [f"What is the colour of the {thing}?" for thing in THINGS],
    }
    answers = [f"It is {COLOUR_OF[thing]}." for thing in THINGS] * 2
    chat = write(
        base / "chat",
        "dataset.chat",
        {
            split: [{"messages": [ask(q), say(a)]} for q, a in zip(questions, answers, strict=False)]
            for split, questions in asked.items()
        },
    )
    wrong = [f"It is {COLOURS[(COLOURS.index(COLOUR_OF[thing]) + 1) % 4]}." for thing in THINGS] * 2
    preference = write(
        base / "preference",
        "dataset.preference",
        {
            split: [
                {"prompt": [ask(q)], "chosen": [say(right)], "rejected": [say(bad)]}
                for q, right, bad in zip(questions, answers, wrong, strict=False)
            ]
            for split, questions in asked.items()
        },
    )
    stages = get_registry().stages
    made = run_stage(stages["tokenize"], base / "tokenize", {"vocab_size": 300}, text=text)
    tokens, tokenizer = made.outputs["tokens"], made.outputs["tokenizer"]
    trained = run_stage(stages["train-pretrain"], base / "model", {**SHAPE, **FAST}, tokens=tokens, tokenizer=tokenizer)
    return World(text, chat, preference, tokenizer, tokens, trained.outputs["model"])


@pytest.fixture
def inputs(world: World) -> dict[str, dict[str, Artifact]]:
    """What each training stage is given."""
    return {
        "train-pretrain": {"tokens": world.tokens, "tokenizer": world.tokenizer},
        "sft": {"model": world.model, "data": world.chat},
        "rlhf": {"model": world.model, "data": world.preference},
        "distill": {"teacher": world.model, "student": world.model, "data": world.chat},
    }


@pytest.fixture(scope="session")
def teacher(world: World, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Knows the answers to the questions of `world.chat`."""
    params = {**FAST, "max_steps": 120, "batch_size": 24, "lr": 0.02, "embedding_lr": 0.01}
    directory = tmp_path_factory.mktemp("teacher")
    made = run_stage(get_registry().stages["sft"], directory, params, model=world.model, data=world.chat)
    return made.outputs["model"]


@pytest.fixture(scope="session")
def student(world: World, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Narrower than the world's model and with one layer; knows nothing."""
    import torch

    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    torch.manual_seed(3)
    config = ModelConfig(
        arch="llama", vocab_size=300, dim=24, layers=1, heads=2, ff_dim=48, context=48, bos_id=0, eos_id=1, pad_id=2
    )
    directory = tmp_path_factory.mktemp("student")
    save_model(Transformer(config), directory, tokenizer_from=world.tokenizer.path)
    return Artifact(directory, "model.hf")


@pytest.fixture
def train(tmp_path: Path, inputs: dict[str, dict[str, Artifact]]) -> Trainer:
    """Run a training stage: `train("sft", "name", {"lr": …}, data=…)`; short by default."""

    def run(
        stage: str, name: str = "run", params: dict[str, Any] | None = None, stop_after: int | None = None, **given: Any
    ) -> StageResult:
        shape = SHAPE if stage == "train-pretrain" and not given.get("model") else {}
        values = {**shape, **FAST, **(params or {})}
        declared = get_registry().stages[stage]
        return run_stage(declared, tmp_path / name, values, stop_after, **{**inputs[stage], **given})

    return run


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Artifact]:
    """`make_dataset("dataset.chat", {"train": [row, …]})`."""
    return lambda kind, rows, name="made": write(tmp_path / name, kind, rows)


@pytest.fixture
def weights() -> Callable[[StageResult | Artifact], bytes]:
    """The bytes of a model's weights."""

    def read(of: StageResult | Artifact) -> bytes:
        artifact = of if isinstance(of, Artifact) else of.outputs["model"]
        return (artifact / "model.safetensors").read_bytes()

    return read
