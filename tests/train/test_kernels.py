"""The kernel of attention that a training names is the one that torch ran; another one says the same, held whole."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmctl.train.data import ExampleSource
from llmctl.train.generate import TorchGenerator
from llmctl.train.kernels import RECORDER, KernelWatch, kernels_of, operators_listed
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams


def train(ctx, model, examples, **changes):
    """(what was logged of kernels, what was recorded, the final loss)."""
    values = TrainParams(**{"batch_size": 4, "max_steps": 3, "warmup_steps": 1, "lr": 0.01, **changes})
    final = fit(ctx, model, CausalLM(), ExampleSource(examples, 32, values), values)
    said = [fields["text"] for kind, fields in ctx.events if kind == "log" and "attention kernel" in fields["text"]]
    recorded = json.loads((ctx.output("metrics") / "metrics.json").read_text())["attention.kernel"]
    return said, recorded, final["loss.train"]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_training_names_the_kernel_once(make_context, make_model, make_examples, kv_heads):
    said, recorded, _ = train(make_context(), make_model(kv_heads=kv_heads), make_examples(24))
    assert (said, recorded) == (["attention kernel: flash"], "flash")


def test_a_forced_fallback_is_named_and_learns_the_same(make_context, make_model, make_examples):
    examples = make_examples(24)
    *_, loss = train(make_context("a"), make_model(), examples)
    with sdpa_kernel(SDPBackend.MATH):
        said, recorded, forced = train(make_context("b"), make_model(), examples)
    held = "attention kernel: math, which holds all scores: memory grows with the square of the length"
    assert (said, recorded) == ([held], "math")
    assert forced == pytest.approx(loss, rel=1e-5)


def test_soft_capped_scores_have_no_kernel(make_context, make_model, make_examples):
    model = make_model(arch="gemma2", attention_softcap=5.0, window=8)
    said, recorded, _ = train(make_context(), model, make_examples(24))
    assert recorded == "plain"
    assert "holds all scores" in said[0]


def test_a_training_that_goes_on_names_it_again(make_context, make_model, make_examples):
    examples = make_examples(24)
    for step in (1, 2):
        ctx = make_context(stop_after=1)
        with pytest.raises(BaseException, match="step"):
            train(ctx, make_model(), examples, max_steps=9)
        assert [f["value"] for k, f in ctx.events if k == "metric" and f["name"] == "attention.kernel"] == ["flash"], (
            step
        )


def test_a_forced_fallback_says_the_same_tokens(make_model):
    generator = TorchGenerator(make_model(seed=3, context=64).eval())
    prompts = [[1, 2, 3], [7] * 20, [5, 9, 11, 4, 2]]
    expected = generator.generate(prompts)
    with sdpa_kernel(SDPBackend.MATH):
        assert generator.generate(prompts) == expected


@pytest.mark.parametrize("wanted", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_what_is_named_is_what_torch_was_told(wanted):
    watch, q = KernelWatch(TrainParams(batch_size=1, max_steps=1)), torch.randn(1, 2, 16, 8)
    with sdpa_kernel(wanted), watch.forward():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert watch.kernels == ({"FLASH_ATTENTION": "flash", "MATH": "math"}[wanted.name],)
    assert (watch.news(), watch.news()) == (True, False)


def test_one_pass_is_looked_at_the_second_of_a_compiled_model():
    q = torch.randn(1, 2, 16, 8)
    for compiled, seen in ((False, [True, True]), (True, [False, True])):
        watch = KernelWatch(TrainParams(batch_size=1, max_steps=1, compile=compiled))
        found = []
        for _ in range(2):
            with watch.forward():
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
            found.append(bool(watch.kernels))
        assert found == seen


def test_somebody_elses_profile_is_left_alone():
    watch, q = KernelWatch(TrainParams(batch_size=1, max_steps=1)), torch.randn(1, 2, 16, 8)
    with operators_listed() as theirs, watch.forward():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert watch.kernels == ()
    assert kernels_of(theirs) == ("flash",)


@pytest.mark.gpu
def test_on_a_gpu(make_context, make_model, make_examples):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    _, recorded, _ = train(make_context(), make_model(dim=128, heads=2), make_examples(24), device="cuda")
    assert recorded in ("flash", "memory-efficient", "cudnn")


@pytest.mark.parametrize("name", RECORDER)
def test_a_torch_that_cannot_be_watched_trains_all_the_same(make_context, make_model, make_examples, monkeypatch, name):
    monkeypatch.delattr(torch.autograd, name)
    ctx = make_context()
    values = TrainParams(batch_size=4, max_steps=2, warmup_steps=1, lr=0.01)
    final = fit(ctx, make_model(), CausalLM(), ExampleSource(make_examples(24), 32, values), values)
    assert final["loss.train"] > 0
    assert not [fields for kind, fields in ctx.events if kind == "log" and "attention kernel" in fields["text"]]
