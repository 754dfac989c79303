"""`augment` by back-translation: the models are opened once, every text goes there and back."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmctl import Artifact, UsageError
from llmctl.generator import Sampling
from llmctl.registry import Registry
from llmctl.testing import run_stage
from llmctl.text.datasets import read_rows
from llmctl.text.tokenizer import Tokenizer
from llmctl_data import DATA

from .conftest import write_byte_tokenizer


class Dictionary:
    """A model with an encoder that puts words for words."""

    backend, context_length, encoder_decoder = "dictionary", 200, True

    def __init__(self, tokenizer: Tokenizer, words: dict[str, list[str]]) -> None:
        self._tokenizer, self._words = tokenizer, words

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        found = []
        for prompt in prompts:
            assert prompt[0] == self._tokenizer.bos_id and prompt[-1] == self._tokenizer.eos_id
            rng = random.Random(sampling.seed)
            words = self._tokenizer.decode(prompt).split()
            first = sampling.temperature == 0
            said = [(self._words.get(w, [w])[0] if first else rng.choice(self._words.get(w, [w]))) for w in words]
            found.append(self._tokenizer.encode(" ".join(said)))
        return found


def test_back_translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_byte_tokenizer(tmp_path / "there")
    shutil.copytree(path, tmp_path / "back")
    tokenizer = Tokenizer.load(path)
    words = {"there": {"awful": ["schlimm"]}, "back": {"schlimm": ["terrible", "bad", "horrid", "poor", "grim"]}}
    opened = []

    def open_generator(self: Any, artifact: Artifact, **options: Any) -> Dictionary:
        opened.append(artifact.path.name)
        return Dictionary(tokenizer, words[artifact.path.name])

    monkeypatch.setattr(Registry, "open_generator", open_generator)
    step = {"name": "augment", "group": "neg", "share": 0.3, "method": "back-translation"}
    models = {name: Artifact(tmp_path / name, "model.onnx") for name in words}
    values = {"labelled": {"task": "classification"}, "validation_share": 0.0, "steps": [step]}
    path = tmp_path / "rows.jsonl"
    told = [("awful" if n % 8 == 0 else "good", n) for n in range(400)]
    lines = [{"text": f"{word} thing number {n} here", "label": "pos" if word == "good" else "neg"} for word, n in told]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [Artifact(path, "files")]
    made = run_stage(DATA, tmp_path / "made", values, files=files, **models)
    every = list(read_rows(made.outputs["labelled"], "train"))
    derived = [row for row in every if "parent" in row]
    assert opened == ["there", "back"]
    assert len(derived) == 100 and Counter(row["label"] for row in every)["neg"] / len(every) == pytest.approx(0.3)
    parents = {row["id"]: row["text"] for row in every}
    for row in derived:
        first, _, rest = row["text"].partition(" ")
        assert first in words["back"]["schlimm"] and parents[row["parent"]] == f"awful {rest}"
    assert len({row["text"] for row in derived}) == 100, "two from a parent are in other words"
    Dictionary.encoder_decoder = False
    try:
        with pytest.raises(UsageError, match="has no encoder"):
            run_stage(DATA, tmp_path / "wrong", values, files=files, **models)
    finally:
        Dictionary.encoder_decoder = True
