"""What computing in less memory keeps equal, how much less it is, and what is tried before the first step."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmctl.errors import MachineError
from llmctl.nn.config import TRAITS
from llmctl.train import memory, recompute
from llmctl.train.compilation import compiled_blocks
from llmctl.train.cross_entropy import summed_loss, token_losses
from llmctl.train.data import ExampleSource
from llmctl.train.loop import fit
from llmctl.train.memory import available, kept_bytes, largest_fitting
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams
from llmctl.train.recompute import recomputed
from llmctl.train.validation import mean_loss


def params(**changes: Any) -> TrainParams:
    values = {"batch_size": 8, "max_steps": 3, "warmup_steps": 1, "log_every": 1, "lr": 0.01}
    return TrainParams(**{**values, **changes})


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def python_bytes() -> int:
    """Storages of all tensors that Python holds: where selective recomputation keeps what it keeps."""
    gc.collect()
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor
    }
    return sum(found.values())


def measured(model, mode: str, dropout: float) -> tuple[float, Tensor, int]:
    """Loss, gradient, and bytes kept between the forward and the backward pass."""
    tokens = torch.randint(0, 48, (8, 128), generator=torch.Generator().manual_seed(3))
    model.train()
    model.set_dropout(dropout)
    model.zero_grad()
    torch.manual_seed(1)
    found = []
    with recomputed(model, mode, dropout):
        before = python_bytes() if mode == "selective" else 0
        kept = kept_bytes(lambda: found.append(model(tokens).logsumexp(-1).sum()) or found[0], model)
        kept += python_bytes() - before if mode == "selective" else 0
        found[0].backward()
    return found[0].item(), torch.cat([p.grad.flatten() for p in model.parameters()]), kept


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
@pytest.mark.parametrize("arch", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_recomputed_gradients_are_bitwise_equal_and_take_less_memory(make_model, arch: str, dropout: float) -> None:
    heads = {"kv_heads": 4} if arch == "gpt2" else {}
    model = make_model(arch=arch, layers=6, dim=64, ff_dim=176, context=128, **heads)
    loss, gradient, all_of_it = measured(model, "none", dropout)
    # A gated layer leaves more that is cheap to compute again. Of norms and rotary turns little is kept in any mode.
    for mode, times in (("full", 5.0), ("selective", 1.35 if arch == "llama" else 1.15)):
        again, found, kept = measured(model, mode, dropout)
        assert again == loss and torch.equal(found, gradient), mode
        assert all_of_it / kept >= times, mode
    # The control: a flag that does nothing would keep as much, and other dropout give another gradient.
    assert measured(model, "none", dropout)[2] == pytest.approx(all_of_it, rel=0.01)
    assert all(block.recompute is None for block in model.blocks)


KINDS = {
    "t5": {"arch": "t5", "kv_heads": 4, "encoder_layers": 2},
    "xl": {"traits": replace(TRAITS["llama"], positions="xl"), "kv_heads": 4},
    "windows": {"window": 8, "pattern": "LS"},
    "soft cap": {"attention_softcap": 5.0},
    "bert": {"arch": "bert", "kv_heads": 4, "head": "mlm"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_can_be_recomputed(make_model, kind: str) -> None:
    model = make_model(**KINDS[kind]).train()
    model.set_dropout(0.1)
    tokens = torch.randint(0, 48, (2, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for mode in ("none", "full", "selective"):
        model.zero_grad()
        torch.manual_seed(1)
        with recomputed(model, mode, 0.1):
            memory_ = {"memory": model.remember(tokens)} if kind == "t5" else {}
            model(tokens, **memory_).logsumexp(-1).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0].abs().max() > 0


def test_selective_keeps_products_and_fused_attention_unless_it_drops(monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(recompute, "_policy", lambda chosen, *rest: kept.append(chosen))
    for dropout in (0.0, 0.1):
        recompute.wrapper("selective", dropout).keywords["context_fn"].args[0](None, None)
    assert kept == [recompute.PRODUCTS | recompute.KERNELS, recompute.PRODUCTS]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_training_with_recomputation_is_the_same_training(make_context, make_model, make_examples, mode: str) -> None:
    found = []
    for chosen in ("none", mode):
        model, values = make_model(), params(recompute=chosen, dropout=0.1)
        fit(make_context(chosen), model, CausalLM(), ExampleSource(make_examples(20), 32, values), values)
        found.append(weights(model))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changes", "count"), [({}, 2), ({"window": 8, "pattern": "LS"}, 4)], ids=["alike", "two kinds"]
)
def test_blocks_alike_are_compiled_once(make_model, changes: dict[str, Any], count: int) -> None:
    """Twice, as the first block fills in the masks that the others find."""
    model = make_model(layers=12, **changes)
    graphs = []
    tokens = torch.arange(32)[None]
    expected = model(tokens)
    torch.compiler.reset()
    with compiled_blocks(model, True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward):
        assert torch.allclose(model(tokens), expected, atol=1e-6)
    assert len(graphs) <= count
    assert [block.attention.layer for block in model.blocks] == list(range(12))
    assert all("compute" not in vars(block) for block in model.blocks)


def test_a_compiled_loss_is_the_loss_with_its_gradients(make_model) -> None:
    model = make_model(tie_embeddings=False)
    targets = torch.randint(0, 48, (50,), generator=torch.Generator().manual_seed(1))
    found, graphs = [], []
    for wanted in (False, True):
        states = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.zero_grad()
        with compiled_blocks(model, wanted, backend=lambda graph, inputs: graphs.append(graph) or graph.forward):
            loss, _ = summed_loss(model, states, targets)
        loss.backward()
        found.append([loss, states.grad, model.head_weight.grad])
    assert len(graphs) == 1  # head and loss are one piece
    assert model.loss is None
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


HEADS = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "soft cap": {"logit_softcap": 3.0},
    "scaled": {"arch": "t5", "kv_heads": 4, "encoder_layers": 1},
    "masked": {"arch": "bert", "kv_heads": 4, "head": "mlm"},
}


@pytest.mark.parametrize("head", HEADS)
def test_chunked_cross_entropy_has_the_same_loss_and_gradients(make_model, head: str) -> None:
    model = make_model(**HEADS[head])
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 32, generator=generator)
    targets = torch.randint(0, 48, (50,), generator=generator)
    found = []
    for chunk in (0, 7):
        model.loss_chunk = chunk
        for count in (summed_loss, token_losses):
            model.zero_grad()
            leaf = states.clone().requires_grad_()
            loss, hits = summed_loss(model, leaf, targets, accuracy=True) if count is summed_loss else (None, {})
            loss = token_losses(model, leaf, targets).sum() if loss is None else loss
            (loss * 0.25).backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            with torch.no_grad():
                quiet = summed_loss(model, states, targets)[0]
            found.append((loss.detach(), leaf.grad, grads, quiet, hits))
    for loss, grad, grads, quiet, _ in found[1:]:
        assert torch.allclose(loss, found[0][0], rtol=1e-6) and torch.allclose(quiet, loss, rtol=1e-6)
        assert (grad - found[0][1]).abs().max() <= 1e-6
        assert all((a - b).abs().max() <= 2e-6 for a, b in zip(grads, found[0][2], strict=True))
    assert found[0][4]["accuracy"] == found[2][4]["accuracy"]
    assert (found[0][1]).abs().max() > 1e-3


def test_chunks_hold_fewer_logits(make_model) -> None:
    model = make_model(vocab_size=4096)
    targets = torch.arange(2048) % 4096
    states = torch.randn(2048, 32, requires_grad=True)
    peaks = {}
    for chunk in (0, 128):
        model.loss_chunk = chunk
        with torch.profiler.profile(profile_memory=True) as profile:
            summed_loss(model, states, targets)[0].backward()
        held, peak = 0, 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks[chunk] = peak
    assert peaks[0] > 2 * 2048 * 4096 * 4  # the logits and their gradient
    assert peaks[0] / peaks[128] > 8


def test_a_chunked_run_follows_the_same_curve(make_context, make_model, make_examples) -> None:
    curves = []
    for chunk in (0, 5):
        model, values = make_model(logit_softcap=5.0), params(loss_chunk=chunk, max_steps=6)
        source, ctx = ExampleSource(make_examples(20), 32, values), make_context(f"chunk-{chunk}")

        def measure(model, compute, source=source):
            return mean_loss(model, CausalLM(), source.sweep(2), compute)

        fit(ctx, model, CausalLM(), source, values, measure)
        curves.append([f["value"] for kind, f in ctx.events if kind == "metric" and str(f["name"]).startswith("loss")])
        assert model.loss_chunk == 0
    assert curves[0] == pytest.approx(curves[1], abs=1e-5) and curves[0] != curves[1]


class Hungry(CausalLM):
    """A fake allocator: more than `rows` rows of tokens do not fit, of the longest example or any other."""

    rows = 3
    tried: list[tuple[int, int]]

    def loss(self, model, batch):
        self.tried.append(tuple(batch.tokens.shape))
        if len(batch.tokens) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory (fake)")
        return super().loss(model, batch)


def test_auto_finds_what_fits_before_the_first_step(make_context, make_model, make_examples) -> None:
    examples = make_examples(30)
    longest = max(len(example) for example in examples)
    values = params(micro_batch="auto", packing="none", optimizer="adamw", dropout=0.1)
    found = []
    for chosen in (values, params(micro_batch=2, packing="none", optimizer="adamw", dropout=0.1)):
        ctx, model = make_context(str(chosen.micro_batch)), make_model()
        Hungry.tried = []
        source = ExampleSource(examples, 32, chosen)
        final = fit(ctx, model, Hungry(), source, chosen)
        found.append(weights(model))
        if chosen is values:
            assert final["micro_batch"] == source.at_once == 2
            first = Hungry.tried[:6]
            # Estimated for one, then tried: the longest examples first.
            assert [rows for rows, _ in first] == [1, 8, 1, 4, 1, 2]
            assert all(width >= longest - 1 for _, width in first)
            assert any("micro_batch auto: 2 of 8 sequences" in str(f.get("text")) for _, f in ctx.events)
            assert max(rows for rows, _ in Hungry.tried[6:]) == 2
    assert torch.equal(*found)  # trying leaves no trace: weights, optimizer and random state are put back


def test_what_does_not_fit_at_all_is_said_at_once(make_context, make_model, make_examples, monkeypatch) -> None:
    values = params(micro_batch="auto", packing="none")
    monkeypatch.setattr(Hungry, "rows", 0)
    Hungry.tried = []
    with pytest.raises(MachineError, match="not even one sequence at a time fits") as error:
        fit(make_context(), make_model(), Hungry(), ExampleSource(make_examples(20), 32, values), values)
    assert "loss_chunk" in (error.value.hint or "")
    # Without `auto` the CPU is not tried; what happens then is an error of the machine with the same advice.
    values = params(packing="none")
    with pytest.raises(MachineError, match="out of memory at step 1"):
        fit(make_context("plain"), make_model(), Hungry(), ExampleSource(make_examples(20), 32, values), values)


def test_on_the_cpu_the_estimate_decides(make_context, make_model, make_examples, monkeypatch) -> None:
    model, values = make_model(), params(micro_batch="auto", packing="none")
    source = ExampleSource(make_examples(20), 32, values)
    source.at_once = 1
    each = kept_bytes(lambda: CausalLM().loss(model, source.heaviest())[0], model)
    fixed = 3 * sum(parameter.nbytes for parameter in model.parameters())
    source.at_once = 8
    monkeypatch.setattr(memory, "available", lambda: fixed + 5 * each)
    final = fit(make_context(), model, CausalLM(), source, values)
    assert final["micro_batch"] == 4  # 4 sequences, and one for the backward pass
    assert available() > 0


def test_halving_ends_at_one() -> None:
    tried: list[int] = []

    def attempt(count: int) -> None:
        tried.append(count)
        if count > 1:
            raise torch.OutOfMemoryError

    assert largest_fitting(12, attempt, lambda: None) == 1 and tried == [12, 6, 3, 2, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_offloaded_state_is_in_the_hosts_memory_and_trains_alike(make_context, make_model, make_examples):
    found = []
    for offload in (False, True):
        model, values = make_model(), params(offload_optimizer=offload, optimizer="adamw", precision="float32")
        fit(make_context(str(offload)), model, CausalLM(), ExampleSource(make_examples(20), 32, values), values)
        found.append(weights(model))
    assert torch.allclose(*found, atol=1e-6)
