"""The whole chain as a user types it, with the real stages: five commands, four pipes, one bundle."""

import subprocess
import sys
from pathlib import Path

import pytest

CHAIN = """
llmctl() { %(python)s -m llmctl "$@"; }
llmctl data --reader python-stdlib --set 'modules=[json, "json.*", textwrap, shlex, bisect, heapq, fractions]' \\
    --validation-share 0.3 --set questions.facts=20 --set questions.heldout_entities=2 --set questions.unanswerable=2 |
llmctl tokenize --vocab-size 500 |
llmctl train-pretrain --dim 32 --layers 1 --heads 2 --kv-heads 1 --context 128 --max-steps 3 --batch-size 2 |
llmctl sft --max-steps 2 --batch-size 2 --probe-prompts 0 |
llmctl export-onnx --parity-prompts 2 --format path
echo "${PIPESTATUS[@]}"
"""


@pytest.mark.slow
def test_the_chain_as_typed(llmctl_env, llmctl, tmp_path):
    work = tmp_path / "work"
    script = CHAIN % {"python": sys.executable}
    done = subprocess.run(["bash", "-c", script], cwd=work, env=llmctl_env, capture_output=True, text=True, timeout=280)
    bundle, codes = done.stdout.splitlines()
    assert codes == "0 0 0 0 0", done.stderr
    assert {"model.onnx", "genai_config.json", "tokenizer.json"} <= {path.name for path in Path(bundle).iterdir()}
    for stage in ("data", "tokenize", "train-pretrain", "sft", "export-onnx"):
        assert f"{stage}: done in" in done.stderr
    answer = llmctl("chat", bundle, "--prompt", "What does dumps do?")
    assert answer.returncode == 0, answer.stderr
    assert "data" in llmctl("lineage", bundle).stdout
