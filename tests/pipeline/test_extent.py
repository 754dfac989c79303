"""Going further: what a finished stage leaves is continued by a larger extent, bit for bit and on bounded disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from llmctl import Field, Params
from llmctl.spec.extent import has_extent
from llmctl.store import Store

TRAINED = """
data: {uses: data, with: {reader: python-stdlib, modules: [textwrap, shlex, bisect], validation_share: 0.2,
  questions: {facts: 8, heldout_entities: 2, unanswerable: 2}}}
tokenize: {uses: tokenize, inputs: {text: data}, with: {vocab_size: 400}}
train: {uses: train-pretrain, inputs: {tokens: tokenize, tokenizer: tokenize}, with: {dim: 32, layers: 1, heads: 2,
  kv_heads: 1, context: 64, max_steps: 20, batch_size: 4, schedule: constant}}
"""


def begun(result, stage="c"):
    return result.stages[stage].metrics["begun"]


def test_a_larger_extent_continues_and_a_smaller_one_starts_anew(run, work, actions):
    assert begun(run("c: {uses: count, with: {max_steps: 20}}")) == 0
    directory = work / ".llmctl/store/work"
    assert [path.name for path in directory.glob("*/*")] == ["state.json"]
    further = run(None, "c.max_steps=40")
    assert begun(further) == 20
    assert begun(run(None, "c.max_steps=10")) == 0
    assert actions() == {"c": "run"}
    value = json.loads((further.stages["c"].outputs["result"] / "value.json").read_text())
    straight = run("c: {uses: count, with: {max_steps: 40, start: 0}}", refresh=True)
    assert json.loads((straight.stages["c"].outputs["result"] / "value.json").read_text()) == value
    assert run(None, "c.max_steps=40", "c.start=1").code == 0  # another result, another work directory
    assert len(list(directory.iterdir())) == 2


def test_a_stage_without_an_extent_leaves_nothing(run, work):
    path = work / "attempts"
    assert run(f"w: {{uses: flaky, with: {{path: {path}, good: 1}}}}").code == 0
    assert list((work / ".llmctl/store/work").iterdir()) == []


class Inner(Params):
    far: int = Field(1, affects="extent", description="how far")


class Nested(Params):
    inner: Inner | None = Field(None, description="a model")


class Flat(Params):
    seed: int = Field(1, description="seed")
    speed: int = Field(1, affects="nothing", description="speed")


def test_extents_are_found_in_nested_models():
    assert has_extent(Inner) and has_extent(Nested) and not has_extent(Flat)


@pytest.mark.slow
def test_a_training_goes_on_as_if_it_had_never_ended(llmctl, spec, work):
    """20 steps, then 40, with the real stage: the weights of 40 steps at once, in another store."""
    spec(TRAINED)
    env = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def train(store, steps):
        done = llmctl("run", "p.yaml", "--store", store, "--set", f"train.max_steps={steps}", env=env, timeout=240)
        assert done.returncode == 0, done.stderr
        artifact = Store(work / store).resolve("p/train.model")
        return (artifact / "model.safetensors").read_bytes(), done.stderr

    short, _ = train("one", 20)
    longer, said = train("one", 40)
    assert "train: continuing from step 20 of 40" in said
    kept = list((work / "one/work").glob("*/ckpt/*"))
    assert [path.name for path in kept] == ["step-40"]
    subprocess.run(["cp", "-r", "one", "two"], cwd=work, check=True)
    subprocess.run(["rm", "-r", "two/work", "two/keys"], cwd=work, check=True)
    straight, said = train("two", 40)
    assert "continuing" not in said
    assert longer == straight
    assert longer != short
