"""`eval` and `rag` measure ONNX bundles in a process that cannot import torch, with the numbers of one that can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl_eval import EVAL
from llmctl_rag import RAG

CODE = """
import json, sys

class Absent:
    # Finds none of these modules, as if they were not installed.
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "optimum", "onnx_ir"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from pathlib import Path
from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl_eval import EVAL
from llmctl_rag import RAG
stage, directory, params, inputs = json.loads(sys.argv[1])
given = {port: [Artifact(Path(path), kind) for path, kind in found] for port, found in inputs.items()}
given = {port: found if port == "data" else found[0] for port, found in given.items()}
print(json.dumps(run_stage({"eval": EVAL, "rag": RAG}[stage], Path(directory), params, **given).metrics))
"""
STAGES = {"eval": EVAL, "rag": RAG}
SETTINGS: dict[str, dict[str, Any]] = {
    "eval": {"tasks": ["perplexity", "exact-match"], "splits": {"perplexity": "train"}, "threads": 1},
    "rag": {"answers": "model", "chunk_tokens": 24, "top_k": 2, "max_new_tokens": 8, "threads": 1},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, real_models: tuple[Artifact, Artifact]) -> dict[str, Any]:
    """Inputs of both stages: documents, questions about them, and a bundle."""
    directory = tmp_path_factory.mktemp("given")
    with DatasetWriter(directory / "text", "dataset.text") as writer:
        for name, text in (("cat", "A cat sleeps on a mat."), ("dog", "A dog barks at the moon.")):
            writer.add("train", {"id": name, "source": name, "text": text})
    with DatasetWriter(directory / "chat", "dataset.chat") as writer:
        for name, question, answer in (("cat", "Where sleeps a cat?", "On a mat."), ("dog", "Who barks?", "A dog.")):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            writer.add("validation", {"id": name, "messages": messages, "document": name})
    text, chat = Artifact(directory / "text", "dataset.text"), Artifact(directory / "chat", "dataset.chat")
    bundle = real_models[1]
    return {
        "eval": {"model": bundle, "data": [text, chat]},
        "rag": {"text": text, "questions": chat, "model": bundle},
    }


def apart(stage: str, directory: Path, inputs: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The stage in a process without torch."""
    several = {port: some if isinstance(some, list) else [some] for port, some in inputs.items()}
    found = {port: [(str(artifact.path), artifact.type) for artifact in some] for port, some in several.items()}
    asked = json.dumps([stage, str(directory), SETTINGS[stage], found])
    return subprocess.run([sys.executable, "-c", CODE, asked], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("stage", ["eval", "rag"])
def test_a_bundle_is_measured_as_with_torch(given: dict[str, Any], tmp_path: Path, stage: str) -> None:
    done = apart(stage, tmp_path / "apart", given[stage])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = run_stage(STAGES[stage], tmp_path / "here", SETTINGS[stage], **given[stage]).metrics
    same = {name for name in expected if "seconds" not in name and "per_s" not in name}
    assert len(same) > 3
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}


@pytest.mark.parametrize("stage", ["eval", "rag"])
def test_a_model_that_needs_torch_is_noticed(
    given: dict[str, Any], real_models: tuple[Artifact, Artifact], tmp_path: Path, stage: str
) -> None:
    done = apart(stage, tmp_path / "apart", {**given[stage], "model": real_models[0]})
    assert done.returncode != 0
    assert "torch" in done.stderr.splitlines()[-1]
