from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from llmctl.errors import StageError, TempFail
from llmctl.train import loop
from llmctl.train.batches import Batch, Example, pack
from llmctl.train.data import ExampleSource, TokenSource
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams
from llmctl.train.validation import language_loss, mean_loss


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def lines(ctx, kind: str = "log") -> list[str]:
    """What was said, without the line of the attention kernel, which every training has."""
    said = [str(fields["text"]) for event, fields in ctx.events if event == kind]
    return [text for text in said if not text.startswith("attention kernel: ")]


def params(**changes: object) -> TrainParams:
    values = {"batch_size": 4, "max_steps": 12, "warmup_steps": 2, "save_every": 4, "log_every": 5, "lr": 0.01}
    return TrainParams(**{**values, **changes})


class Given:
    """A model whose hidden states are given logits: the objective's arithmetic alone."""

    loss_chunk, loss = 0, None

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits.requires_grad_()

    def hidden(self, tokens, positions=None, documents=None):
        return self.logits

    def head(self, hidden):
        return hidden


def test_cross_entropy_and_its_gradient_equal_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    model = Given(torch.tensor(rng.normal(size=(2, 8, 11)) * 3, dtype=torch.float32))
    batch = Batch(torch.zeros(2, 8, dtype=torch.long), torch.tensor([1, 5, 9]), torch.tensor([4, 0, 10]), size=16)
    loss, _ = CausalLM().loss(model, batch)
    loss.backward()
    logits = model.logits.detach().double().numpy().reshape(16, 11)
    expected, gradient = 0.0, np.zeros((16, 11))
    for place, target in zip([1, 5, 9], [4, 0, 10], strict=True):
        logs = log_softmax(logits[place])
        expected -= logs[target]
        gradient[place] = np.exp(logs) - np.eye(11)[target]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert np.abs(model.logits.grad.numpy().reshape(16, 11) - gradient).max() <= 1e-6


def one_gradient(make_context, make_model, source, values: TrainParams) -> list[torch.Tensor]:
    """The gradients that the loop itself accumulates for step 0."""
    model = make_model()
    run = loop._Run(make_context(), model, CausalLM(), source, values, None, loop.Compute.of(values), 1)
    batches = source.micro_batches(0)
    run.accumulate(batches, sum(len(batch.targets) for batch in batches))
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_any_split_of_a_batch_gives_the_same_gradient(make_context, make_model, make_examples, micro: int) -> None:
    examples = make_examples(8)
    found = []
    for at_once in (0, micro):
        values = params(batch_size=8, micro_batch=at_once)
        found.append(one_gradient(make_context, make_model, ExampleSource(examples, 32, values), values))
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) <= 1e-6


def test_it_overfits_a_toy_corpus_and_reports_what_it_did(make_context, make_model, make_split) -> None:
    rng = np.random.default_rng(0)
    # Two documents without a token in common, so that every next token can be known.
    first, second = np.split(3 + rng.permutation(45), [20])
    split = make_split([[0, *first.tolist(), 1], [2, *second.tolist(), 1]])
    values = params(max_steps=120, lr=0.02, embedding_lr=0.02, eval_every=60, min_lr_ratio=0.1)
    source = TokenSource(split, 32, values)
    ctx, model = make_context(), make_model()
    final = fit(
        ctx, model, CausalLM(), source, values, lambda m, c: language_loss(m, source.sweep(), c, [0] * 3 + [2] * 45)
    )
    assert final["loss.train"] < 0.05  # D1
    assert final["steps"] == 120 and final["parameters"] == model.config.parameters()
    assert final["tokens"] == 240 * 49 and final["tokens_per_s"] > 0  # 4 rows a step, 2 rows of 49 tokens an epoch
    rows = [json.loads(line) for line in (ctx.output("metrics") / "curves.jsonl").read_text().splitlines()]
    curve = [row for row in rows if "loss" in row]
    assert [row["step"] for row in curve] == list(range(5, 121, 5))
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= set(curve[0])
    assert [row["step"] for row in rows if "loss.validation" in row] == [60, 120]
    assert curve[0]["loss"] > 1 > curve[-1]["loss"] and curve[0]["lr"] > curve[-1]["lr"] > 0.02 * 0.1 * 0.99
    shown = [fields for kind, fields in ctx.events if kind == "progress"]
    assert [(row["step"], row["total"]) for row in shown] == [(n, 120) for n in range(1, 121)]
    assert all({"loss", "tokens_per_s"} <= set(row) for row in shown)
    assert not model.training


def test_language_loss_leaves_specials_out_of_bits_per_byte(make_model, make_split) -> None:
    split = make_split([[0, 5, 6, 7, 1], [0, 9, 1]])
    model = make_model().eval()
    values = params()
    sizes = [0, 0, 0, *[3] * 45]
    found = language_loss(model, TokenSource(split, 32, values).sweep(), loop.Compute.of(values), sizes)
    nats = text = 0.0
    for ids in ([0, 5, 6, 7, 1], [0, 9, 1]):
        logs = model(torch.tensor([ids])).log_softmax(-1)[0].double()
        losses = [-logs[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
        nats, text = nats + sum(losses), text + sum(losses[:-1])
    assert found["loss.validation"] == pytest.approx(nats / 6, rel=1e-6)
    assert found["bpb.validation"] == pytest.approx(text / (4 * 3) / math.log(2), rel=1e-6)


def test_mean_loss_is_weighted_by_targets(make_model, make_examples) -> None:
    examples, model = make_examples(9), make_model().eval()
    compute = loop.Compute.of(params())
    parts = [pack(examples[:2], 32), pack(examples[2:], 32)]
    whole = mean_loss(model, CausalLM(), [pack(examples, 32)], compute)
    assert mean_loss(model, CausalLM(), parts, compute) == pytest.approx(whole, rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_weights(make_context, make_model, make_examples) -> None:
    class Breaks(CausalLM):
        def loss(self, model, batch):
            loss, further = super().loss(model, batch)
            Breaks.calls += 1
            return (loss * math.nan if Breaks.calls == 3 else loss), further

    Breaks.calls = 0
    model, values = make_model(), params()
    with pytest.raises(StageError, match=r"the loss is nan .* at step 3") as error:
        fit(make_context(), model, Breaks(), ExampleSource(make_examples(8), 32, values), values)
    assert "lower lr" in (error.value.hint or "")
    assert weights(model).isfinite().all()


def test_a_step_without_targets_is_refused(make_context, make_model) -> None:
    nothing = [Example(np.arange(5), np.zeros(5, bool))] * 4
    with pytest.raises(StageError, match="step 1 has nothing to learn from"):
        fit(make_context(), make_model(), CausalLM(), ExampleSource(nothing, 32, params()), params())


class Noisy(CausalLM):
    """Needs the random state to be continued, too."""

    def loss(self, model, batch):
        loss, _ = super().loss(model, batch)
        noise = torch.rand(()) * 0.5 + 0.75
        return loss * noise, {"noise": noise * len(batch.targets)}


def trained(make_context, make_model, examples, name: str, values: TrainParams, stops: list[int]) -> tuple:
    """Run to the end through the given interruptions, each from a fresh process's point of view."""
    held_out = ExampleSource(examples[:5], 32, values)

    def measure(model, compute):
        return mean_loss(model, CausalLM(), held_out.sweep(), compute)

    for stop in stops:
        torch.manual_seed(999)
        with pytest.raises(TempFail):
            fit(make_context(name, stop), make_model(5), Noisy(), ExampleSource(examples, 32, values), values, measure)
    torch.manual_seed(555)
    ctx, model = make_context(name), make_model(6)
    if not stops:
        model = make_model(5)
    final = fit(ctx, model, Noisy(), ExampleSource(examples, 32, values), values, measure)
    rows = (ctx.output("metrics") / "curves.jsonl").read_text().splitlines()
    for row in (curve := [json.loads(line) for line in rows]):
        row.pop("tokens_per_s", None)
    final.pop("tokens_per_s", None)
    return weights(model), final, curve


RECIPES: dict[str, dict[str, object]] = {
    "muon": {},
    "muon-all": {"muon_iteration": "polar-express", "muon_variance": True, "cautious_decay": True, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw"},
    "adamw-cautious": {"optimizer": "adamw", "cautious_decay": True, "weight_decay": 0.1, "decay_embeddings": True},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion", "lr": 1e-3},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "schedule-free": {"optimizer": "schedule-free", "schedule": "constant", "eval_every": 3},
    "ema": {"ema": 0.9, "eval_every": 3},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16", "schedule": "inverse-sqrt"},
    "less-memory": {"recompute": "selective", "loss_chunk": 5, "dropout": 0.1, "micro_batch": "auto"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_is_bit_identical(make_context, make_model, make_examples, recipe: str, monkeypatch) -> None:
    monkeypatch.setattr("llmctl.train.eight_bit.SMALLEST", 1024)
    monkeypatch.setattr("llmctl.train.device.LossScale.START", 2.0**40)  # overflows first
    examples, values = make_examples(11), params(**RECIPES[recipe])
    straight = trained(make_context, make_model, examples, "straight", values, [])
    stopped = trained(make_context, make_model, examples, "stopped", values, [1, 3, 0, 5])
    assert torch.equal(straight[0], stopped[0])
    assert straight[1:] == stopped[1:]  # final numbers and the whole curve as well


def test_dropping_any_part_of_a_checkpoint_is_noticed(make_context, make_model, make_examples, monkeypatch) -> None:
    """The control of the resume test: each part matters."""
    examples, values = make_examples(11), params()
    straight = trained(make_context, make_model, examples, "straight", values, [])[0]
    original = loop.Checkpoints.load

    def broken(part: str):
        def load(self, step, *like):
            found = original(self, step, *like)
            if part == "random/cpu":
                found.tensors[part] = torch.Generator().manual_seed(1).get_state()
            for name in [name for name in found.tensors if name.endswith(part) and part != "random/cpu"]:
                found.tensors[name] = torch.zeros_like(found.tensors[name])
            return found

        return load

    for part in ("random/cpu", "/momentum_buffer", "/exp_avg"):
        name = part.strip("/").replace("/", "-")
        with pytest.raises(TempFail):
            fit(make_context(name, 5), make_model(5), Noisy(), ExampleSource(examples, 32, values), values)
        monkeypatch.setattr(loop.Checkpoints, "load", broken(part))
        resumed = trained(make_context, make_model, examples, name, values, [])[0]
        monkeypatch.setattr(loop.Checkpoints, "load", original)
        assert not torch.equal(straight, resumed), part


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_the_one_before_stays(
    make_context, make_model, make_examples, monkeypatch
) -> None:
    values, write = params(), loop.Checkpoints.save

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def save(self, step: int, *given, **named) -> None:
        if step == 12:
            monkeypatch.setattr("llmctl.train.storage.save_file", full)
        write(self, step, *given, **named)

    monkeypatch.setattr(loop.Checkpoints, "save", save)
    ctx = make_context("full")
    with pytest.raises(StageError, match="No space left on device"):
        fit(ctx, make_model(5), Noisy(), ExampleSource(make_examples(11), 32, values), values)
    assert loop.Checkpoints(ctx.resume_dir / "ckpt").steps() == [4, 8]


def test_a_checkpoint_on_request_changes_nothing(make_context, make_model, make_examples) -> None:
    examples, values = make_examples(11), params()
    straight = trained(make_context, make_model, examples, "straight", values, [])[0]
    ctx, model = make_context("asked"), make_model(5)
    ctx._save = iter([False] * 5 + [True] + [False] * 20).__next__
    fit(ctx, model, Noisy(), ExampleSource(examples, 32, values), values)
    assert torch.equal(weights(model), straight)
    assert [fields["step"] for kind, fields in ctx.events if kind == "checkpoint"] == [0, 4, 5, 8, 12]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(make_context, make_model, make_examples, tmp_path) -> None:
    examples, values = make_examples(11), params()
    straight = trained(make_context, make_model, examples, "straight", values, [])[0]
    with pytest.raises(TempFail):
        fit(make_context("hurt", 6), make_model(5), Noisy(), ExampleSource(examples, 32, values), values)
    kept = sorted((tmp_path / "hurt/resume/ckpt").iterdir())
    assert [path.name for path in kept] == ["step-4", "step-6"]
    (kept[1] / "rank-0.safetensors").write_bytes(b"damaged")
    ctx = make_context("hurt")
    model = make_model(7)
    fit(ctx, model, Noisy(), ExampleSource(examples, 32, values), values)
    assert torch.equal(weights(model), straight)
    assert any("step-6 is damaged" in str(fields["text"]) for kind, fields in ctx.events if kind == "warning")


def test_more_steps_continue_and_other_parameters_start_anew(make_context, make_model, make_examples) -> None:
    examples = make_examples(11)

    def go(**changes: object) -> tuple[dict[str, float], list[str]]:
        values, ctx = params(**changes), make_context("one")
        final = fit(ctx, make_model(), CausalLM(), ExampleSource(examples, 32, values), values)
        return final, [str(f["text"]) for kind, f in ctx.events if kind in ("log", "warning")]

    go()
    final, said = go(max_steps=16)
    assert final["steps"] == 16 and said[0] == "continuing from step 12 of 16"
    assert "planned for 12 steps" in said[1]  # the cosine is another one from here on
    final, said = go(max_steps=8)
    assert final["steps"] == 8 and "tokens_per_s" in final and "starting anew" not in "".join(said)
    final, said = go(lr=0.003)
    assert final["steps"] == 12 and "made with other parameters" in said[0]
    final, said = go(lr=0.003, log_every=1, threads=1, device="cpu", save_every=0)
    assert said == ["continuing from step 12 of 12"] and "tokens_per_s" not in final


def test_a_finished_run_goes_on_as_if_it_had_never_ended(make_context, make_model, make_examples) -> None:
    """6 steps, then 12: bit for bit the weights of 12 steps, where the schedule does not look at the end."""
    examples = make_examples(11)

    def go(name: str, steps: int, **changes: object) -> tuple[torch.Tensor, list[str], list[str]]:
        values = params(max_steps=steps, save_every=5, **{"schedule": "constant", **changes})
        ctx, model = make_context(name), make_model(5)
        fit(ctx, model, Noisy(), ExampleSource(examples, 32, values), values)
        return weights(model), lines(ctx), lines(ctx, "warning")

    straight, said, _ = go("straight", 12)
    assert said == []
    short = go("further", 6)[0]
    longer, said, warned = go("further", 12)
    assert said == ["continuing from step 6 of 12"] and warned == []
    assert torch.equal(longer, straight) and not torch.equal(short, longer)
    # With a schedule that falls towards the end it is another run, which is said.
    go("cosine", 6, schedule="cosine")
    _, said, warned = go("cosine", 12, schedule="cosine")
    assert said == ["continuing from step 6 of 12"]
    assert "its run was planned for 6 steps, the rate was 15% of its peak at step 6" in warned[0]
    # `wsd` that still holds has not looked at the end yet, a warm-up that was cut short has.
    with pytest.raises(TempFail):
        values = params(max_steps=10, schedule="wsd", save_every=0)
        fit(make_context("wsd", 4), make_model(5), Noisy(), ExampleSource(examples, 32, values), values)
    assert go("wsd", 8, schedule="wsd")[1:] == (["continuing from step 4 of 8"], [])
    go("warm", 3, warmup_steps=5)
    assert "its run was planned for 3 steps" in go("warm", 5, warmup_steps=5)[2][0]


def test_a_shorter_run_leaves_what_a_longer_one_has_left(make_context, make_model, make_examples, tmp_path) -> None:
    examples = make_examples(11)

    def go(steps: int) -> list[str]:
        values, ctx = params(max_steps=steps, schedule="constant"), make_context("one")
        fit(ctx, make_model(), CausalLM(), ExampleSource(examples, 32, values), values)
        kept = sorted(path.name for path in (tmp_path / "one/resume/ckpt").iterdir())
        return lines(ctx) + kept

    assert go(12) == ["step-12"]  # of a run that has ended one checkpoint is enough
    assert go(8) == ["step-12", "step-8"]
    assert go(10) == ["continuing from step 8 of 10", "step-10", "step-12"]
    assert go(16) == ["continuing from step 12 of 16", "step-16"]


def test_epochs_and_clipping(make_context, make_model, make_examples) -> None:
    values = params(max_steps=None, epochs=1.5, clip=1e-9, optimizer="adamw", lr=1e-3)
    ctx = make_context()
    final = fit(ctx, make_model(), CausalLM(), ExampleSource(make_examples(10), 32, values), values)
    assert final["steps"] == 4  # 1.5 * 10 / 4, rounded up
    norms = [f["value"] for kind, f in ctx.events if kind == "metric" and f["name"] == "grad_norm"]
    assert min(norms) > 1e-3  # reported before clipping
    unclipped, tiny = make_model(), make_model()
    for model, limit in ((unclipped, 0.0), (tiny, 1e-12)):
        one = params(max_steps=1, clip=limit, lr=0.01, optimizer="adamw", warmup_steps=0)
        fit(make_context(f"clip{limit}"), model, CausalLM(), ExampleSource(make_examples(10), 32, one), one)
    moved = [(weights(model) - weights(make_model())).abs().max() for model in (unclipped, tiny)]
    # AdamW divides by the gradient's own size; only beside its epsilon of 1e-8 does a clipped gradient move less.
    assert moved[0] == pytest.approx(0.01, rel=0.01) and moved[1] < 1e-4


def test_bf16_on_cpu_is_mixed_precision(make_context, make_model, make_examples) -> None:
    found = {}
    for precision in ("float32", "bf16"):
        values = params(precision=precision, max_steps=3)
        model = make_model()
        fit(make_context(precision), model, CausalLM(), ExampleSource(make_examples(10), 32, values), values)
        assert model.embedding.weight.dtype == torch.float32
        found[precision] = weights(model)
    assert not torch.equal(found["float32"], found["bf16"])
    assert torch.allclose(found["float32"], found["bf16"], atol=0.05)


def test_too_little_disk_is_told_before_the_first_step(make_context, make_model, make_examples, monkeypatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(1, 1, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    ctx = make_context()
    with pytest.raises(StageError, match=r"training needs \d+ MiB, 1 MiB are free"):
        fit(ctx, make_model(), CausalLM(), ExampleSource(make_examples(4), 32, params()), params())
    assert not any(kind == "progress" for kind, _ in ctx.events)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_training_follows_the_same_curve(make_context, make_model, make_split) -> None:
    split = make_split([np.random.default_rng(n).integers(3, 48, 200).tolist() for n in range(4)])
    found = {}
    for wanted in (False, True):
        values = params(max_steps=3, log_every=1, compile=wanted, packing="none")
        ctx, model = make_context(f"compile-{wanted}"), make_model()
        fit(ctx, model, CausalLM(), TokenSource(split, 32, values), values)
        found[wanted] = [f["value"] for kind, f in ctx.events if kind == "metric" and f["name"] == "loss"]
        assert all("compute" not in vars(block) for block in model.blocks)
    assert found[True] == pytest.approx(found[False], abs=1e-4)


def test_what_the_machine_lacks_is_said_before_training(monkeypatch) -> None:
    import shutil

    from llmctl.errors import MachineError
    from llmctl.train.device import Compute

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="torch sees no NVIDIA GPU"):
        Compute.of(params(device="cuda"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match=r"no C\+\+ compiler"):
        Compute.of(params(compile=True))
    assert str(Compute.of(params())) == "cpu float32" and not Compute.of(params()).bf16


def test_flex_attention_is_refused_where_it_has_no_gradients() -> None:
    from llmctl.errors import MachineError
    from llmctl.train.device import Compute

    with pytest.raises(MachineError, match="computes its gradients on CUDA only"):
        Compute.of(params(device="cpu", attention="flex"))


def test_dropout_is_the_trainings_and_resumes(make_context, make_model, make_examples) -> None:
    examples, values = make_examples(11), params(dropout=0.2)
    straight = trained(make_context, make_model, examples, "straight", values, [])
    stopped = trained(make_context, make_model, examples, "stopped", values, [1, 3])
    assert torch.equal(straight[0], stopped[0])
    without = trained(make_context, make_model, examples, "without", params(), [])
    assert not torch.equal(straight[0], without[0])


def test_threads_are_limited_inside_only() -> None:
    from llmctl.train.device import Compute

    before = torch.get_num_threads()
    with Compute.of(params(threads=1)).limit_threads():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_trains_in_bf16_and_resumes(make_context, make_model, make_examples) -> None:
    examples, values = make_examples(11), params(precision="auto")
    with pytest.raises(TempFail):
        fit(make_context("gpu", 5), make_model(), CausalLM(), ExampleSource(examples, 32, values), values)
    model = make_model(3)
    final = fit(make_context("gpu"), model, CausalLM(), ExampleSource(examples, 32, values), values)
    straight = make_model()
    fit(make_context("straight"), straight, CausalLM(), ExampleSource(examples, 32, values), values)
    assert final["steps"] == 12 and final["peak_memory_bytes"] > 0
    assert model.embedding.weight.device.type == "cpu"
    assert torch.allclose(weights(model), weights(straight), atol=0.02)


def test_final_numbers_do_not_depend_on_how_often_points_are_logged(make_context, make_model, make_split):
    split = make_split([[0, *range(3, 30), 1], [0, *range(30, 48), 1]])
    found = []
    for log_every in (1, 7, 50):
        values = params(max_steps=23, lr=0.02, embedding_lr=0.02, log_every=log_every)
        source = TokenSource(split, 32, values)
        found.append(fit(make_context(f"every-{log_every}"), make_model(), CausalLM(), source, values))
        del found[-1]["tokens_per_s"]
    assert found[0] == found[1] == found[2]
    assert math.isfinite(found[0]["loss.train"])


KNOBS: list[tuple[dict[str, object], dict[str, object]]] = [
    ({}, {"lr": 0.011}),
    ({}, {"embedding_lr": 0.01}),
    ({"tie_embeddings": False}, {"head_lr": 0.01}),
    ({}, {"vector_lr": 0.01}),
    ({}, {"scale_lr_with_batch": "sqrt", "reference_batch": 8}),
    ({"scale_lr_with_batch": "sqrt", "reference_batch": 8}, {"scale_lr_with_batch": "linear"}),
    ({}, {"scale_lr_with_width": "sqrt", "reference_width": 64}),
    ({"optimizer": "adamw", "scale_lr_with_width": "sqrt"}, {"scale_lr_with_width": "inverse"}),
    ({}, {"weight_decay": 0.1}),
    ({"weight_decay": 0.1}, {"decay_embeddings": True}),
    ({"weight_decay": 0.1}, {"cautious_decay": True}),
    ({"optimizer": "adamw"}, {"beta1": 0.8}),
    ({"optimizer": "adamw"}, {"beta2": 0.9}),
    ({"optimizer": "adamw"}, {"epsilon": 1e-4}),
    ({"optimizer": "sgd"}, {"momentum": 0.5}),
    ({"optimizer": "sgd"}, {"nesterov": False}),
    ({}, {"muon_scale": "match_rms_adamw"}),
    ({}, {"muon_iteration": "polar-express"}),
    ({}, {"muon_variance": True}),
    ({}, {"clip": 0.1}),
    ({}, {"ema": 0.5}),
    ({}, {"warmup_steps": 1}),
    ({}, {"min_lr_ratio": 0.5}),
    ({"schedule": "wsd"}, {"decay_share": 0.2}),
    ({"schedule": "wsd"}, {"schedule": "inverse-sqrt"}),
    ({}, {"precision": "bf16"}),
    ({}, {"precision": "fp16"}),
    ({}, {"dropout": 0.1}),
    ({}, {"seed": 1}),
]


@pytest.mark.parametrize(("base", "change"), KNOBS, ids=lambda values: "+".join(values) or "default")
def test_every_knob_does_something(make_context, make_model, make_examples, base, change) -> None:
    shape = {name: value for name, value in base.items() if name == "tie_embeddings"}
    found, said = [], []
    for further in ({}, change):
        values = params(max_steps=4, **{**{name: base[name] for name in base if name not in shape}, **further})
        ctx, model = make_context(str(len(found))), make_model(layers=1, **shape)
        fit(ctx, model, CausalLM(), ExampleSource(make_examples(8), 32, values), values)
        found.append(weights(model))
        said.append(lines(ctx))
    assert not torch.equal(*found)
    if any(name.startswith("scale") for name in change):
        assert said[1][-1].startswith("peak rates matrix ") and said[0] != said[1]
