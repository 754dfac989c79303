"""An environment with nothing but the base dependencies opens a bundle and answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.generator import Sampling
from llmctl.ort import open_bundle

ROOT = Path(__file__).parents[2]
CODE = """
import importlib.util, json, sys
absent = [name for name in ("torch", "transformers", "onnx", "optimum") if importlib.util.find_spec(name) is None]
from llmctl.generator import Sampling
from llmctl.ort import open_bundle
tokens = list(open_bundle(sys.argv[1], "cpu", 1).stream([5, 6, 7], Sampling(max_new_tokens=20)))
print(json.dumps([absent, tokens]))
"""


@pytest.mark.slow
def test_the_base_install_generates(bundle: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([python, "-c", CODE, bundle], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    absent, tokens = json.loads(done.stdout)
    assert absent == ["torch", "transformers", "onnx", "optimum"]
    assert tokens == list(open_bundle(bundle, "cpu", 1).stream([5, 6, 7], Sampling(max_new_tokens=20)))
