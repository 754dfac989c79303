"""The benchmarks that need a GPU, or peers, at least run; their numbers are none here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def shown(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=BENCHMARKS.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_is_profiled_on_cpu(tmp_path: Path) -> None:
    wanted = ["--device", "cpu", "--shapes", "tiny", "--precision", "float32", "--no-compile"]
    found = shown(str(BENCHMARKS / "gpu_train.py"), *wanted, "--steps", "3", "--threads", "1", "--trace", str(tmp_path))
    assert (tmp_path / "tiny.json").is_file()
    assert re.search(r"matmul peak [\d.]+ TFLOP/s", found)
    shares = {
        name.strip(): float(share) for name, share in re.findall(r"([a-z][a-z, -]+?) ([\d.]+)%", found.splitlines()[-1])
    }
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert shares["matrix products"] > 1 and shares["attention"] > 1 and shares["optimizer"] > 0.1
    assert 0 < float(re.search(r"MFU ([\d.]+)%", found)[1]) < 100


@pytest.mark.slow
def test_an_int8_cache_is_timed_beside_float32(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmctl import Artifact
    from llmctl.testing import run_stage
    from llmctl_export_onnx import EXPORT_ONNX

    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, intermediate_size=96, **shape)).save_pretrained(tmp_path / "hf")
    model = Artifact(tmp_path / "hf", "model.hf")
    made = run_stage(EXPORT_ONNX, tmp_path, {"parity_prompts": 1, "threads": 1}, model=model).outputs["model"]
    wanted = ["--batch", "2", "--length", "32", "--steps", "3", "--threads", "1"]
    found = shown(str(BENCHMARKS / "kv_cache.py"), str(made.path), *wanted)
    assert "bytes of a token: float32 512, int8 128, ratio 0.250" in found
    assert re.search(r"batch +2, behind +32: float32 +[\d.]+ tokens/s, int8 +[\d.]+ tokens/s, ratio [\d.]+", found)


@pytest.mark.slow
def test_our_side_of_the_comparison_trains_in_turns() -> None:
    found = shown(str(BENCHMARKS / "train.py"), "--shapes", "tiny", "--compile", "0", "--rounds", "2", "--threads", "1")
    assert re.search(r"llmctl +\d+ tokens/s   llmctl is 1\.00 times as fast", found)


@pytest.mark.slow
def test_adapters_are_timed_beside_the_plain_bundle() -> None:
    shape = ["--dim", "64", "--layers", "1", "--rank", "2", "--adapters", "2", "--batch", "2"]
    found = shown(str(BENCHMARKS / "adapters.py"), *shape, "--new", "4", "--rounds", "1", "--threads", "1")
    cases = re.findall(r"batch +2 (.+?) +[\d.]+ tokens/s, ([\d.]+) of plain", found)
    assert [name for name, _ in cases] == ["plain", "without adapter", "one", "model and two", "all 2"]
    assert cases[0][1] == "1.000"


@pytest.mark.slow
def test_pruned_bundles_are_smaller_and_timed() -> None:
    shape = ["--dim", "64", "--layers", "2", "--rounds", "1", "--prompt", "16", "--steps", "2"]
    sides = json.loads(shown(str(BENCHMARKS / "prune.py"), *shape).splitlines()[-1])["sides"]
    dense, sparse = sides.pop("dense"), sides.pop("wanda, half 0")
    for size in ("parameters", "safetensors", "onnx"):
        assert all(side[size] < dense[size] for side in sides.values())
        assert sparse[size] == pytest.approx(dense[size], rel=1e-3)  # the control: zeros take their place
    assert all(side[f"{what}_ratio"] > 0 for side in sides.values() for what in ("prompt", "step"))
