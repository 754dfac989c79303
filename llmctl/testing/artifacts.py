"""Tiny artifacts of llmctl's own types, made on the spot: the same bytes every time, no download, no torch but for one.

`make("dataset.text", directory)` is what the conformance kit binds to an input when the author names no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmctl.errors import MachineError, UsageError
from llmctl.stage import Artifact
from llmctl.store import types

SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ANIMALS = ("heron", "otter", "marten", "plover", "lynx", "badger", "curlew", "stoat", "adder", "kestrel")
PLACES = ("the marsh", "a hedge", "the old mill", "a pine wood", "the north slope", "a quarry")
HABITS = ("hunts at dusk", "sleeps by day", "swims well", "nests in spring", "fears no dog", "eats beetles")
ROWS = {"train": 40, "validation": 10}


def make(type: str, directory: Path) -> Artifact:
    """Write a tiny artifact of `type` into `directory`. UsageError for a type that cannot be made here."""
    if type not in MAKERS:
        raise UsageError(
            f"there is no tiny artifact of the type `{type}`", hint=f"give a path; made are: {', '.join(MAKERS)}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        MAKERS[type](directory)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise MachineError(f"a tiny {type} needs the module `{name}`", hint="pip install 'llmctl[train]'") from error
    return Artifact(directory, type, "", types.check(type, directory))


def facts(split: str) -> Iterator[tuple[str, str, str]]:
    """(animal, place, habit), none of them twice over both splits."""
    start = 0 if split == "train" else ROWS["train"]
    for number in range(start, start + ROWS[split]):
        yield ANIMALS[number % 10], PLACES[(number // 10) % 6], HABITS[(number * 7 + number // 10) % 6]


def _dataset(format: str, row: Callable[[str, str, str], dict[str, Any]]) -> Callable[[Path], None]:
    """A maker of datasets whose rows belong together by `document`, the id of the text that they are about."""

    def write(directory: Path) -> None:
        from llmctl.text.datasets import DatasetWriter

        with DatasetWriter(directory, format, tuple(ROWS)) as writer:
            for split in ROWS:
                for number, fact in enumerate(facts(split)):
                    name = f"{split}-{number}"
                    writer.add(split, {"id": name, "document": name, **row(*fact)})

    return write


def _text(animal: str, place: str, habit: str) -> dict[str, Any]:
    return {"source": f"{animal}.md", "text": f"The {animal} of {place} {habit}.\n\nWho looks for it finds {place}."}


def _conversation(animal: str, place: str, habit: str) -> dict[str, Any]:
    question, answer = f"What do you know of the {animal} of {place}?", f"It {habit}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _preference(animal: str, place: str, habit: str) -> dict[str, Any]:
    prompt, chosen = _conversation(animal, place, habit)["messages"]
    rejected = {"role": "assistant", "content": f"Nobody has seen a {animal}."}
    return {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]}


def _labelled(animal: str, place: str, habit: str) -> dict[str, Any]:
    return {"text": f"The {animal} of {place}", "label": habit}


def _tokenizer(directory: Path) -> None:
    """One token per byte after the six special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate([*SPECIAL, *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    raw.save(str(directory / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _tokens(directory: Path) -> None:
    """The tiny text in the tokens of the tiny tokenizer."""
    import tempfile

    from llmctl.text.shards import ShardWriter
    from llmctl.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        _tokenizer(Path(folder))
        tokenizer = Tokenizer.load(Path(folder))
        with ShardWriter(
            directory, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.digest, splits=list(ROWS)
        ) as writer:
            for split in ROWS:
                for fact in facts(split):
                    text = _text(*fact)["text"]
                    writer.add(split, tokenizer.frame_document(tokenizer.encode(text)), len(text.encode()))


def _files(directory: Path) -> None:
    for animal, place, habit in facts("validation"):
        text = f"# The {animal}\n\n{_text(animal, place, habit)['text']}\n"
        (directory / f"{animal}.md").write_text(text, encoding="utf-8")


def _metrics(directory: Path) -> None:
    (directory / "metrics.json").write_text('{\n  "loss": 1.5,\n  "rows": 40\n}\n', encoding="utf-8")


def _model(directory: Path) -> None:
    """Two layers of random weights with the tiny tokenizer; needs torch."""
    import tempfile

    import torch

    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    config = ModelConfig(
        arch="llama",
        vocab_size=len(SPECIAL) + 256,
        dim=32,
        layers=2,
        heads=2,
        kv_heads=1,
        context=256,
        bos_id=0,
        eos_id=1,
        pad_id=2,
    )
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        _tokenizer(Path(folder))
        torch.manual_seed(0)
        save_model(Transformer(config), directory, Path(folder))


MAKERS: dict[str, Callable[[Path], None]] = {
    "dataset.text": _dataset("dataset.text", _text),
    "dataset.chat": _dataset("dataset.chat", _conversation),
    "dataset.preference": _dataset("dataset.preference", _preference),
    "dataset.labelled": _dataset("dataset.labelled", _labelled),
    "tokenizer": _tokenizer,
    "dataset.tokens": _tokens,
    "files": _files,
    "metrics": _metrics,
    "model.hf": _model,
}
"""What can be made, by artifact type."""
