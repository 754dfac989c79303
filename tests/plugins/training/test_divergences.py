"""What distillation minimises: closed forms, scipy's entropies, and TRL's generalized Jensen-Shannon divergence."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch, Example, pack
from llmctl_distill.losses import LogitDistillation, forward_kl, generalized_jsd

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0)
ROOT = Path(__file__).parents[3]
RECORDED = Path(__file__).with_name("trl_jsd.json")
PEERS = os.environ.get("LLMCTL_PEERS", "")


def logits(seed: int) -> torch.Tensor:
    return torch.randn(7, 19, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def expected(s: np.ndarray, t: np.ndarray, beta: float) -> tuple[float, np.ndarray]:
    """Value and gradient with respect to logits whose softmax `s` is, by the formulas of the paper."""
    if beta == 0:
        return entropy(t, s, axis=-1).sum(), s - t
    mixture = beta * t + (1 - beta) * s
    slope = np.log(s / t) if beta == 1 else (1 - beta) * np.log(s / mixture)
    value = beta * entropy(t, mixture, axis=-1) + (1 - beta) * entropy(s, mixture, axis=-1)
    if beta == 1:
        value = entropy(s, t, axis=-1)
    return value.sum(), s * (slope - (s * slope).sum(-1, keepdims=True))


@pytest.mark.parametrize(("beta", "temperature"), list(itertools.product(BETAS, TEMPERATURES)))
def test_values_and_gradients_are_the_closed_forms(beta: float, temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss = generalized_jsd(student, teacher, beta, temperature)
    loss.backward()
    s, t = (softmax(x.detach().numpy() / temperature, axis=-1) for x in (student, teacher))
    value, gradient = expected(s, t, beta)
    assert loss.item() == pytest.approx(temperature**2 * value, rel=1e-9)
    assert np.abs(student.grad.numpy() - temperature * gradient).max() <= 1e-9  # T^2, once divided by T


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_zero_for_equal_distributions_alone(beta: float) -> None:
    teacher = logits(1)
    assert generalized_jsd(teacher + 4.0, teacher, beta).item() == pytest.approx(0, abs=1e-12)
    for seed in range(20):
        other = teacher + 0.1 * logits(2 + seed)
        assert generalized_jsd(other, teacher, beta).item() > 1e-4


def test_one_half_is_symmetric_and_other_betas_are_mirrored() -> None:
    student, teacher = logits(0), logits(1)
    assert generalized_jsd(student, teacher, 0.5).item() == pytest.approx(
        generalized_jsd(teacher, student, 0.5).item(), rel=1e-12
    )
    assert generalized_jsd(student, teacher, 0.1).item() == pytest.approx(
        generalized_jsd(teacher, student, 0.9).item(), rel=1e-12
    )
    # The control: the two KLs are not the same, so a swapped direction is noticed.
    forward, reverse = forward_kl(student, teacher).item(), generalized_jsd(student, teacher, 1.0).item()
    assert abs(forward - reverse) > 0.05 * forward


def test_near_the_ends_it_is_beta_times_the_divergence_at_the_end() -> None:
    student, teacher = logits(0), logits(1)
    for end, other in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        value = generalized_jsd(student, teacher, end).item()
        assert np.isfinite(value)
        assert generalized_jsd(student, teacher, other).item() / 1e-7 == pytest.approx(value, rel=1e-3)


def differences(said: dict, beta_of=lambda beta: beta, square: bool = True) -> list[float]:
    """How far ours is from TRL's values and gradients, at worst by case; both sum over the same targets."""
    student, teacher = (torch.tensor(said[name], dtype=torch.float64) for name in ("student", "teacher"))
    learned = torch.tensor(said["labels"]) != -100
    found = []
    for case in said["cases"]:
        given = student.clone().requires_grad_()
        temperature = case["temperature"]
        loss = generalized_jsd(given[learned], teacher[learned], beta_of(case["beta"]), temperature)
        loss.backward()
        factor = temperature**2 if square else 1.0  # TRL leaves it out
        gradient = (given.grad - factor * torch.tensor(case["gradient"], dtype=torch.float64)).abs().max().item()
        found.append(max(abs(loss.item() - factor * case["loss"]), gradient))
    return found


def test_values_and_gradients_are_those_that_trl_gave() -> None:
    said = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert said["trl"] == "1.16.0" and len(said["cases"]) == len(BETAS) * len(TEMPERATURES)
    assert max(differences(said)) <= 1e-9


def test_another_direction_or_no_square_is_not_trls() -> None:
    said = json.loads(RECORDED.read_text(encoding="utf-8"))
    swapped = differences(said, lambda beta: 1 - beta)
    assert all(distance > 1e-2 for case, distance in zip(said["cases"], swapped, strict=True) if case["beta"] != 0.5)
    unsquared = differences(said, square=False)
    assert all(
        distance > 1e-2 for case, distance in zip(said["cases"], unsquared, strict=True) if case["temperature"] != 1
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2])
def test_values_and_gradients_are_those_that_trl_gives(seed: int) -> None:
    """`python -m venv peers && peers/bin/pip install trl torch`, and LLMCTL_PEERS names the directory `peers`."""
    python = Path(PEERS) / "bin" / "python"
    if not PEERS or not list(Path(PEERS).glob("lib/python*/site-packages/trl")):
        pytest.skip("set LLMCTL_PEERS to an environment with trl")
    command = [str(python), "benchmarks/peers/trl_jsd.py", "--seed", str(seed), "--shape", "4", "16", "300"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    said = json.loads(run.stdout)
    scale = max(abs(case["loss"]) for case in said["cases"])
    assert max(differences(said)) <= 1e-11 * scale


# -- as an objective ---------------------------------------------------------------------------------------------------


def make(seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(arch="llama", vocab_size=50, dim=32, layers=2, heads=4, context=64)).double()


def batches(count: int, packed: bool = True, at_once: int = 0) -> list[Batch]:
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        length = int(rng.integers(4, 30))
        rows.append(Example(rng.integers(0, 50, length), np.append(rng.random(length - 1) < 0.6, True)))
    return [pack(rows[i : i + (at_once or count)], 64, packed) for i in range(0, count, at_once or count)]


def gradient(objective, model: Transformer, parts: list[Batch]) -> list[torch.Tensor]:
    """Of the mean over the targets of all parts, as the loop takes it."""
    weight = sum(objective.weight(batch) for batch in parts)
    model.zero_grad()
    for batch in parts:
        (objective.loss(model, batch)[0] / weight).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_splits_packing_and_chunks_of_logits_give_the_same_gradient(beta: float) -> None:
    objective, model = LogitDistillation(make(0).eval(), 2.0, 0.25, beta), make(1)
    whole = gradient(objective, model, batches(8))
    assert apart(whole, gradient(objective, model, batches(8, at_once=3))) <= 1e-12
    assert apart(whole, gradient(objective, model, batches(8, packed=False))) <= 1e-12
    model.loss_chunk = 5
    assert apart(whole, gradient(objective, model, batches(8))) <= 1e-12
    # The control: a mean of the parts' means is another gradient.
    model.loss_chunk = 0
    parts = batches(8, at_once=3)
    means = [gradient(objective, model, [part]) for part in parts]
    mean = [torch.stack(each).mean(0) for each in zip(*means, strict=True)]
    assert apart(whole, mean) > 1e-5


def test_chunks_hold_fewer_logits_at_a_time() -> None:
    objective, model, (batch,) = LogitDistillation(make(0).eval()), make(1), batches(8)
    seen: list[int] = []
    head = model.head
    model.head = lambda states: (seen.append(len(states)), head(states))[1]  # type: ignore[method-assign]
    model.loss_chunk = 5
    objective.loss(model, batch)[0].backward()
    assert max(seen) == 5 and sum(seen) == 2 * len(batch.targets)  # once more for the gradient


def test_what_the_stage_is_told_is_what_it_minimises(train, student) -> None:
    """Each divergence ends elsewhere, and `beta` at its ends is the KL of that end."""

    def curve(name: str, **params) -> list[float]:
        given = {"max_steps": 4, "log_every": 1, **params}
        return [value for _, value in train("distill", name, given, student=student).curve("loss")]

    forward, reverse, half = curve("f"), curve("r", divergence="reverse-kl"), curve("j", divergence="jsd")
    assert len({round(first, 6) for first in (forward[0], reverse[0], half[0])}) == 3
    assert curve("j0", divergence="jsd", beta=0.0) == forward
    assert curve("j1", divergence="jsd", beta=1.0) == reverse
    assert curve("j5", divergence="jsd", beta=0.5) == half
