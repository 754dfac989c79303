"""Reading large sweeps stays cheap: CPU time, best of three, so that a busy machine changes nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.budget

TEXT = """
llmctl: 1
name: t
stages:
  data: {{uses: data}}
  tok: {{uses: tokenize, inputs: {{text: data}}}}
  train: {{uses: train-pretrain, inputs: {{tokens: tok, tokenizer: tok}}}}
  sft:
    uses: sft
    inputs: {{model: train, data: data.chat}}
    matrix: {{lr: [1e-5, 3e-5], seed: {seeds}}}
    with: {{lr: "${{{{ matrix.lr }}}}", seed: "${{{{ matrix.seed }}}}", max_steps: 2}}
  eval: {{uses: eval, foreach: sft, inputs: {{model: sft, data: data.chat}}}}
  best: {{select: {{model: "sft[*]", metrics: "eval[*]"}}, by: {{metric: acc, mode: max}}}}
  onnx: {{uses: export-onnx, inputs: {{model: best}}}}
"""


def cpu(work) -> float:
    def once():
        begun = time.process_time()
        work()
        return time.process_time() - begun

    work()
    return min(once() for _ in range(3))


def test_two_thousand_instances_are_read_in_under_250_ms(load, budget):
    text = TEXT.format(seeds=list(range(500)))
    assert len(load(text).stages) == 2005
    assert cpu(lambda: load(text)) < budget(0.250)


def test_the_cost_grows_with_the_instances_and_not_faster(load):
    small, large = TEXT.format(seeds=list(range(100))), TEXT.format(seeds=list(range(800)))
    assert cpu(lambda: load(large)) < 16 * cpu(lambda: load(small)), "eight times the instances"


def test_check_of_the_largest_shipped_spec_stays_under_400_ms(llmctl_env, budget):
    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "llmctl", "check", "quickstart"]
        subprocess.run(command, env=llmctl_env, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    once()
    assert min(once() for _ in range(5)) < budget(0.400)
