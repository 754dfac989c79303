"""What a distillation is forecast to take, against counts of tensors and, slowly, what processes take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from llmctl.forecast import Given, Unknown
from llmctl.nn import products
from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import forward_flops
from llmctl.nn.hf import save_model
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact
from llmctl.train import generate
from llmctl.train.batches import Example, pack
from llmctl_distill import forecast as foretold
from llmctl_distill.hidden import HiddenDistillation, add_projections
from llmctl_distill.layers import layer_pairs
from llmctl_distill.losses import LogitDistillation
from llmctl_distill.params import DistillParams
from llmctl_distill.relations import RelationLoss, relation_heads

TEACHER = {"vocab_size": 4000, "dim": 32, "layers": 4, "heads": 4, "ff_dim": 64, "context": 64}
STUDENT = {**TEACHER, "dim": 16, "layers": 2, "ff_dim": 32}


def make(shape) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(arch="llama", **shape))


def full(rows: int, vocabulary: int = 4000, length: int = 64):
    rng = np.random.default_rng(0)
    made = [Example(rng.integers(0, vocabulary, length + 1), np.ones(length + 1, bool)) for _ in range(rows)]
    return pack(made, length)


class Live(TorchDispatchMode):
    """The peak of bytes of all tensors made inside that take at least `least`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.live, self.peak = least, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.nbytes() >= self.least and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return found


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 2.0}, {"divergence": "reverse-kl"}, {"divergence": "jsd"}, {"divergence": "jsd", "beta": 0.0}],
    ids=json.dumps,
)
def test_logits_are_as_many_as_the_loss_holds(params) -> None:
    values = DistillParams(**params)
    teacher, model, batch = make(TEACHER).eval(), make(STUDENT), full(4)
    objective = LogitDistillation(teacher.requires_grad_(False), values.temperature, 0.5, values.mixture)
    size = len(batch.targets) * 4000 * 4
    with Live(size) as live:
        objective.loss(model, batch)[0].backward()
    assert live.peak / size == foretold.logits_held(values)


def given(shape) -> Given:
    class Made:
        config = ModelConfig(arch="llama", **shape)

    return Given(forecast=Made())  # type: ignore[arg-type]


@pytest.fixture
def predict(monkeypatch):
    """The forecast of two shapes that are not made yet."""

    def made(teacher=TEACHER, student=STUDENT, **params):
        def config(found: Given, port: str) -> ModelConfig:
            return found.forecast.config  # type: ignore[union-attr]

        monkeypatch.setattr(foretold, "config_of", config)
        monkeypatch.setattr("llmctl.train.forecasting.config_of", config)
        values = DistillParams(**{"device": "cpu", "batch_size": 4, "save_every": 0, "prefetch": 0, **params})
        return foretold.forecast(values, {"teacher": given(teacher), "student": given(student)})

    return made


@pytest.mark.parametrize("relations", ["none", "values", "attention", "both"])
def test_operations_are_those_that_torch_counts(predict, relations: str, monkeypatch) -> None:
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", False)  # torch counts its own operators alone
    teacher, model, batch = make(TEACHER).eval().requires_grad_(False), make(STUDENT), full(4)
    pairs = layer_pairs(2, 4)
    add_projections(model, pairs, 32, 0)
    related = RelationLoss(1, 3, relations, relation_heads(model.config, teacher.config))
    objective = HiddenDistillation(
        LogitDistillation(teacher), pairs, relations=None if relations == "none" else related
    )
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:
        objective.loss(model, batch)[0].backward()
    found = predict(method="hidden", relations=relations).operations_per_token * batch.tokens.numel()
    assert found == counter.get_total_flops()


def test_every_method_says_what_it_takes(predict) -> None:
    logits, written = predict(), predict(method="sequences", max_new_tokens=20)
    hidden = predict(method="hidden", relations="both")
    own = predict(method="on-policy", on_policy_share=0.25)
    student = ModelConfig(arch="llama", **STUDENT)
    assert own.operations_per_token - logits.operations_per_token == forward_flops(student, 64) // 4
    teacher = forward_flops(ModelConfig(arch="llama", **TEACHER), 64)
    assert logits.operations_per_token - written.operations_per_token == teacher
    assert "the teacher answers every prompt, with at most 20 tokens" in written.note
    assert hidden.memory["states"] > 0 and hidden.memory["relations"] > hidden.memory["states"]
    assert "states" not in logits.memory and "relations" not in predict(method="hidden").memory
    assert {found.memory["teacher"] for found in (logits, written, hidden, own)} == {logits.memory["teacher"]}
    assert set(hidden.memory) <= set(hidden.advice) | {"process"}
    assert predict(divergence="jsd").bytes > logits.bytes > predict(loss_chunk=16).bytes > written.bytes / 2
    with pytest.raises(Unknown, match="layer_map"):
        predict(method="hidden", layer_map=[1])


def test_answers_of_many_rows_need_room_for_their_keys_and_values(predict) -> None:
    assert (foretold.MAX_ROWS, foretold.CACHE_BYTES) == (generate.MAX_ROWS, generate.CACHE_BYTES)
    wide = {**STUDENT, "vocab_size": 300, "context": 2048}
    shapes = {"teacher": {**TEACHER, **{"vocab_size": 300, "context": 2048}}, "student": wide}
    few = predict(**shapes, method="on-policy", batch_size=2)
    many = predict(**shapes, method="on-policy", batch_size=64, micro_batch=1)
    assert "cache" not in few.memory
    whole = 64 * 2 * 2 * 4 * 4 * 2048 * 4
    rest = many.memory.get("activations", 0) + many.memory.get("logits", 0)
    assert many.memory.get("cache", 0) + rest == max(whole, rest)


PROGRAM = """
import json, re, sys
from pathlib import Path
from llmctl.registry import get_registry
from llmctl.stage import Artifact
from llmctl.testing import run_stage
def peak():  # not ru_maxrss, which begins with what the process that started this one had
    return int(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1]) * 1024
stage = get_registry().stages["distill"]
given, base = json.loads(sys.argv[1]), Path(sys.argv[2])
inputs = lambda size: {"teacher": Artifact(base / f"teacher-{size}", "model.hf"),
                       "student": Artifact(base / f"student-{size}", "model.hf"),
                       "data": Artifact(base / "chat", "dataset.chat")}
run_stage(stage, base / "warm", {**given, "batch_size": 1, "max_steps": 1}, **inputs("small"))
before = peak()
run_stage(stage, base / "run", given, **inputs("large"))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"divergence": "jsd"},
        {"method": "hidden"},
        {"method": "hidden", "relations": "both"},
        {"method": "on-policy", "on_policy_share": 1.0, "max_new_tokens": 300},
        {"method": "sequences", "max_new_tokens": 300},
    ],
    ids=json.dumps,
)
def test_memory_is_what_a_process_takes(predict, world, make_dataset, tmp_path: Path, params) -> None:
    """Conversations that fill the context, in an allocator that gives every block back."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "q" * 226}]}] * 16
    made = make_dataset("dataset.chat", {"train": rows}, "chat")
    sizes = {"vocab_size": 8192, "heads": 4, "context": 256, "eos_id": 1, "bos_id": 0, "pad_id": 2}
    shapes = {
        "teacher-large": {**sizes, "dim": 256, "layers": 6},
        "student-large": {**sizes, "dim": 192, "layers": 4},
        "teacher-small": {**sizes, "dim": 16, "layers": 2},
        "student-small": {**sizes, "dim": 16, "layers": 1},
    }
    for name, shape in shapes.items():
        save_model(make(shape), tmp_path / name, tokenizer_from=world.tokenizer.path)
    values = {"batch_size": 8, "max_steps": 2, "save_every": 0, "prefetch": 0, "threads": 1, "device": "cpu", **params}
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(values), str(tmp_path)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = predict(shapes["teacher-large"], shapes["student-large"], **values)
    total = found.bytes - found.memory.get("allocator", 0)
    measured = int(run.stdout.splitlines()[-1])
    print(
        json.dumps(params), f"forecast {total / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB", dict(found.memory)
    )
    assert 0.8 <= total / measured <= 1.3
    assert isinstance(made, Artifact)
