from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from llmctl.errors import InputError
from llmctl.nn.config import ModelConfig
from llmctl.nn.hf import load_model, save_model
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.device import Compute
from llmctl_distill import run as stage
from llmctl_distill.losses import LogitDistillation, forward_kl
from llmctl_distill.params import DistillParams

LEARN = {"max_steps": 60, "batch_size": 12, "lr": 0.01, "embedding_lr": 0.005, "log_every": 20}


def logits(seed: int) -> torch.Tensor:
    return torch.randn(7, 19, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_forward_kl_equals_scipy_and_its_gradient_the_closed_form(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss = forward_kl(student, teacher, temperature)
    s, t = (softmax(x.detach().numpy() / temperature, axis=-1) for x in (student, teacher))
    assert loss.item() == pytest.approx(temperature**2 * entropy(t, s, axis=-1).sum(), rel=1e-9)
    loss.backward()
    assert np.abs(student.grad.numpy() - temperature * (s - t)).max() <= 1e-9
    divergence = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x.detach() / temperature) for x in (teacher, student))
    )
    assert loss.item() == pytest.approx(temperature**2 * divergence.sum().item(), rel=1e-9)
    assert forward_kl(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-9)


def test_at_a_high_temperature_the_gradient_is_hintons_limit() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    forward_kl(student, teacher, 1e4).backward()
    centred = student.detach() - student.detach().mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)
    assert torch.allclose(student.grad, centred / 19, atol=1e-3)


class Shuffled(LogitDistillation):
    """The teacher's distributions in another order of positions."""

    def loss(self, model, batch):
        head = self.teacher.head
        self.teacher.head = lambda hidden: head(hidden).flip(0)
        try:
            return super().loss(model, batch)
        finally:
            del self.teacher.head


def test_the_student_comes_closer_to_the_teacher_than_without_it(train, world, teacher, student, monkeypatch) -> None:
    given = {"teacher": teacher, "student": student}
    distilled = train("distill", "kd", LEARN, **given)
    assert distilled.metrics["kl.validation"] < 0.6 * distilled.metrics["kl.before"]
    assert distilled.metrics["parameters"] < distilled.metrics["teacher.parameters"] / 2
    monkeypatch.setattr(stage, "LogitDistillation", Shuffled)
    shuffled = train("distill", "shuffled", LEARN, **given)
    monkeypatch.undo()
    # Both measured by the true teacher.
    fair = LogitDistillation(load_model(teacher.path).eval())
    model, params = load_model(shuffled.outputs["model"].path).eval(), DistillParams(**LEARN)
    ctx = Context("test", {}, student.path, lambda kind, fields: None)
    _, held_out = stage.open_data(ctx, world.chat, Tokenizer.load(teacher.path), model, 48, params)
    measured = stage.validator(held_out, fair, params)(model, Compute.of(params))
    assert measured["kl.validation"] > 1.5 * distilled.metrics["kl.validation"]


def test_it_takes_token_shards_too(train, world, teacher, student) -> None:
    result = train(
        "distill", "tokens", {**LEARN, "temperature": 2.0}, teacher=teacher, student=student, data=world.tokens
    )
    assert result.metrics["kl.validation"] < result.metrics["kl.before"]
    assert {"ce.train", "kl.train", "ce.validation"} <= set(result.metrics)


def test_alpha_one_is_plain_fine_tuning(train, student) -> None:
    alone = train("distill", "alone", {"alpha": 1.0, "log_every": 1}, student=student)
    tuned = train("sft", "tuned", {"log_every": 1}, model=student)
    assert [v for _, v in alone.curve("loss")] == pytest.approx([v for _, v in tuned.curve("loss")], abs=1e-5)
    mixed = train("distill", "mixed", {"alpha": 0.25, "temperature": 2.0, "log_every": 1}, student=student)
    first = {name: mixed.curve(name)[0][1] for name in ("loss", "kl", "ce")}
    assert first["loss"] != pytest.approx(first["ce"], abs=1e-3)


def test_vocabularies_must_be_the_same(train, world, student, tmp_path: Path) -> None:
    config = ModelConfig(arch="llama", vocab_size=310, dim=16, layers=1, heads=2, context=48)
    save_model(Transformer(config), tmp_path / "wide", tokenizer_from=world.tokenizer.path)
    with pytest.raises(InputError, match="the teacher has a vocabulary of 300, the student one of 310"):
        train("distill", student=Artifact(tmp_path / "wide", "model.hf"))
    other = tmp_path / "renamed"
    shutil.copytree(student.path, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(InputError, match="the teacher's tokenizer is sha256:"):
        train("distill", "b", student=Artifact(other, "model.hf"))


def test_the_teacher_is_left_as_it_was(train, world, teacher, student, weights) -> None:
    before = weights(teacher)
    train("distill", teacher=teacher, student=student)
    assert weights(teacher) == before
