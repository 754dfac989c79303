"""A rank of a real training that is made to hang is named with its phase; when it goes on, that is said too."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.launch.heartbeats import AFTER, running

SPEC = """
llmctl: 1
name: p
stages:
  data: {uses: data, with: {reader: python-stdlib, modules: [textwrap, shlex, bisect], questions: {facts: 8}}}
  tokenize: {uses: tokenize, inputs: {text: data}, with: {vocab_size: 300}}
  train:
    uses: train-pretrain
    inputs: {tokens: tokenize, tokenizer: tokenize}
    with: {dim: 32, layers: 2, heads: 2, kv_heads: 2, context: 32, max_steps: 100000, batch_size: 8, device: cpu,
           save_every: 0, parallel: {dp_replicate: 2}}
"""


@pytest.mark.slow
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(SPEC)
    program, store = Path(sys.executable).with_name("llmctl"), tmp_path / "store"
    said: list[str] = []
    stopped: int | None = None
    with subprocess.Popen(
        [program, "run", "p.yaml", "--store", store],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", AFTER: "8", "LLMCTL_LOG_FORMAT": "json"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if stopped is None and '"type": "stage.progress"' in line and '"stage": "train"' in line:
                (stopped,) = [beat.pid for beat in running(store / "work") if beat.rank == 1]
                os.kill(stopped, signal.SIGSTOP)
            if re.search("hangs?: for", line) and stopped:
                os.kill(stopped, signal.SIGCONT)
            if "all ranks go on" in line:
                process.send_signal(signal.SIGTERM)
    text = "".join(said)
    assert "all ranks go on" in text, text[-3000:]
    named = re.findall(r"rank (\d) on \S+ \(process (\d+)\) hangs: for [^`]+ in `(\w+)` of step (\d+)", text)
    assert named and named[-1][0] == "1" and int(named[-1][1]) == stopped, text[-3000:]
    assert named[-1][2] in ("data", "gradients", "optimizer") and int(named[-1][3]) >= 1
    assert process.returncode == 128 + signal.SIGTERM
