"""The specs of tiny models go all the way: trained, exported, evaluated on the ONNX bundle, every gate passed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SPECS = Path(__file__).parents[2] / "specs"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["translation", "bert", "gpt3"])
def test_a_tiny_model_is_trained_exported_and_evaluated(tmp_path: Path, name: str) -> None:
    program = Path(sys.executable).with_name("llmctl")
    words = [program, "run", SPECS / f"{name}.yaml", "--store", tmp_path / "store"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gates: 4 of 4 passed" in done.stdout
