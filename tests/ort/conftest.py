"""A small random LLaMA of transformers, exported by the stage: flat enough that a wrong logit shows in the tokens."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import llmctl_export_onnx
from llmctl import Artifact
from llmctl.ort import OrtGenerator, open_bundle
from llmctl.testing import StageResult, run_stage

sys.path.insert(0, str(Path(__file__).parent / "models"))


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    path = tmp_path_factory.mktemp("hf")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def hf(llama_dir: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def bundle(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    params = {"parity_prompts": 2, "threads": 1}
    return (
        run_stage(llmctl_export_onnx.EXPORT_ONNX, directory, params, model=Artifact(llama_dir, "model.hf"))
        .outputs["model"]
        .path
    )


@pytest.fixture
def generator(bundle: Path) -> OrtGenerator:
    return open_bundle(bundle, "cpu", threads=1)


@pytest.fixture
def broken(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle for tests that damage it."""
    return Path(shutil.copytree(bundle, tmp_path / "broken"))


@pytest.fixture(scope="session")
def trained_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `trained`, in transformers' format."""
    pytest.importorskip("transformers")
    import trained

    return trained.train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def trained_generator(trained_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> OrtGenerator:
    """Its bundle, opened."""
    directory = tmp_path_factory.mktemp("export")
    params = {"parity_prompts": 2, "threads": 1}
    done = run_stage(llmctl_export_onnx.EXPORT_ONNX, directory, params, model=Artifact(trained_dir, "model.hf"))
    return open_bundle(done.outputs["model"].path, "cpu", threads=1)


@pytest.fixture(scope="session")
def adapter_dirs(trained_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of that model that have neither rank nor matrices in common."""
    import lora

    root = tmp_path_factory.mktemp("adapters")
    return {
        "polite": lora.write_adapter(root / "polite", trained_dir, rank=4, seed=1),
        "terse": lora.write_adapter(root / "terse", trained_dir, ("q_proj", "v_proj", "down_proj"), 3, 2, 0.9, (1,)),
    }


@pytest.fixture(scope="session")
def adapted(trained_dir: Path, adapter_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    """The export of the model with both."""
    found = [Artifact(path, "model.adapter", f"sha256:{name}") for name, path in adapter_dirs.items()]
    model = Artifact(trained_dir, "model.hf")
    params = {"parity_prompts": 2, "threads": 1}
    directory = tmp_path_factory.mktemp("export")
    return run_stage(llmctl_export_onnx.EXPORT_ONNX, directory, params, model=model, adapters=found)


@pytest.fixture(scope="session")
def adapted_generator(adapted: StageResult) -> OrtGenerator:
    """Its bundle, opened."""
    return open_bundle(adapted.outputs["model"].path, "cpu", threads=1)
