"""Two random LLaMAs of transformers that are flat enough to tell right from wrong, each opened by both engines."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import llmctl_export_onnx  # noqa: E402
from llmctl import Artifact  # noqa: E402
from llmctl.generator import Generator  # noqa: E402
from llmctl.ort import open_bundle  # noqa: E402
from llmctl.testing import run_stage  # noqa: E402
from llmctl.train.generate import open_model  # noqa: E402

EOS = 2


@dataclass(frozen=True)
class Flat:
    """A model of transformers, and what opens its weights here."""

    theirs: Any
    directory: Path
    onnx: Path

    def open(self, engine: str) -> Generator:
        return open_bundle(self.onnx, "cpu", 1) if engine == "ort" else open_model(self.directory, "cpu")


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, float], Flat]:
    """`flat(vocabulary, initializer_range)`; hidden 32, 2 layers, 4 heads, 2 for keys and values."""
    made: dict[tuple[int, float], Flat] = {}

    def make(vocab: int, spread: float) -> Flat:
        if (vocab, spread) not in made:
            torch.manual_seed(0)
            config = transformers.LlamaConfig(
                vocab_size=vocab,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=spread,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=EOS,
                pad_token_id=0,
            )
            directory = tmp_path_factory.mktemp("flat")
            theirs = transformers.LlamaForCausalLM(config).eval()
            theirs.save_pretrained(directory)
            exported = run_stage(
                llmctl_export_onnx.EXPORT_ONNX,
                tmp_path_factory.mktemp("export"),
                {"parity_prompts": 2, "threads": 1},
                model=Artifact(directory, "model.hf"),
            )
            made[vocab, spread] = Flat(theirs, directory, exported.outputs["model"].path)
        return made[vocab, spread]

    return make
