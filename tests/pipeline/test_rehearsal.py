"""`verify-resume`: a trainer that continues exactly passes, and each way of not doing so is told by name."""

from __future__ import annotations

import json
import os
import sys

import pytest

from llmctl.pipeline.comparison import differences, value_differences

STAGES = """
a: {uses: make}
c: {uses: learn, inputs: {text: a}}
"""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def verify(fake_stages, llmctl, spec):
    """The command, for the trainer with a fault."""
    spec(STAGES)
    return lambda fault, *more: llmctl("verify-resume", "p.yaml", "--set", f"c.fault={fault}", *more)


def test_an_exact_resume_passes_and_a_damaged_checkpoint_is_noticed(verify, work):
    done = verify("", "--control", "--steps", "7")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "c: 7 steps are 3 and 4 more, bit for bit: 2 tensors in 1 files"
    assert second == "c: control: with weight set to zero in the checkpoint 2 differences are found"
    store = work / ".llmctl/store"
    assert not list((store / "tmp").iterdir()) and not list((store / "work").iterdir())  # nothing stays
    assert len(list((store / "keys").glob("*/*"))) == 1  # nor is what was trained anyone's result: this is `a`


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("memory", "error: `c`: 20 steps are not 10 and 10 more: state.safetensors: weight has other bits"),
        slow("anew", "error: `c` was stopped after step 10 and did not go on from there but from step 1"),
        slow("deaf", "error: `c` was asked to stop after step 10 of 20 and went on to its end"),
    ],
)
def test_what_is_lost_at_a_stop_is_told(verify, fault, said):
    done = verify(fault)
    assert done.returncode == 3
    assert said in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_a_control_that_nothing_notices_is_a_failure(verify):
    done = verify("blind", "--control")
    assert done.returncode == 3 and "nothing tells that weight was set to zero" in done.stderr


def test_mistakes(verify, llmctl):
    for arguments, said in (
        (("--at", "20"), "--at 20 leaves nothing of 20 steps to be continued"),
        (("--stage", "a"), "`a` does not train in steps"),
        (("--stage", "b"), "there is no stage `b`"),
    ):
        done = verify("", *arguments)
        assert done.returncode == 2 and said in done.stderr


def test_differences_have_names(tmp_path):
    for name, rows in (("a", [{"loss": 1.5, "tokens_per_s": 3}, {"loss": 1.0}]), ("b", [{"loss": 1.5}, {"loss": 1}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "curves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b/more").write_text("")
    assert list(differences(tmp_path / "a", tmp_path / "a")) == []
    assert list(differences(tmp_path / "a", tmp_path / "b")) == [
        "curves.jsonl: 1.loss is 1.0 without a stop, 1 after it",
        "more is there only after the stop",
    ]
    assert list(value_differences({"a": None}, {})) == []
    assert list(value_differences({"a": 1.0}, {"a": float("nan")})) == ["a is 1.0 without a stop, NaN after it"]


@pytest.mark.slow
def test_the_trainer_passes(llmctl, spec):
    spec("""
data: {uses: data, with: {reader: python-stdlib, modules: [textwrap, shlex, bisect], validation_share: 0.2,
  questions: {facts: 8, heldout_entities: 2, unanswerable: 2}}}
tokenize: {uses: tokenize, inputs: {text: data}, with: {vocab_size: 400}}
train: {uses: train-pretrain, inputs: {tokens: tokenize, tokenizer: tokenize}, with: {dim: 32, layers: 1, heads: 2,
  kv_heads: 1, context: 64, batch_size: 4, dropout: 0.1, ema: 0.9}}
""")
    env = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = llmctl("verify-resume", "p.yaml", "--control", "--steps", "9", env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "train: 9 steps are 4 and 5 more, bit for bit" in done.stdout
    assert "control: with optimizer/" in done.stdout
