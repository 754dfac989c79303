"""Draws from logits in torch against closed forms, each with a control that fails."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scipy.stats import chisquare  # noqa: E402

from llmctl.generator import Sampling  # noqa: E402
from llmctl.train.sampling import Sampler, filtered  # noqa: E402

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5])


def frequencies(sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    sampler = Sampler(sampling)
    probabilities = filtered(LOGITS, sampling).softmax(-1)
    ids = torch.multinomial(probabilities, draws, replacement=True, generator=sampler.random)
    return np.bincount(ids.numpy(), minlength=10)


def fits(counts: np.ndarray, truth: np.ndarray) -> bool:
    assert counts[truth == 0].sum() == 0
    kept = truth > 0
    return chisquare(counts[kept], truth[kept] / truth.sum() * counts.sum()).pvalue > 0.01


def test_filters_draw_from_the_renormalised_truth():
    p = LOGITS.double().softmax(-1).numpy()
    assert fits(frequencies(Sampling(temperature=1.0, seed=1)), p)
    assert fits(frequencies(Sampling(temperature=1.0, top_k=3, seed=2)), np.where(np.arange(10) < 3, p, 0))
    kept = int(np.searchsorted(np.cumsum(p), 0.7)) + 1  # the token that crosses .7 stays
    assert fits(frequencies(Sampling(temperature=1.0, top_p=0.7, seed=3)), np.where(np.arange(10) < kept, p, 0))
    assert fits(frequencies(Sampling(temperature=1.0, top_k=10, seed=4)), p)  # k = vocabulary is plain sampling
    hot = (LOGITS.double() / 2).softmax(-1).numpy()
    assert fits(frequencies(Sampling(temperature=2.0, seed=5)), hot)
    assert not fits(frequencies(Sampling(temperature=0.9, seed=6)), p)  # control


def test_temperature_zero_is_greedy_and_so_is_its_limit():
    assert Sampler(Sampling(temperature=0.0))(LOGITS) == 0
    assert {Sampler(Sampling(temperature=1e-40, seed=s))(LOGITS.flip(0)) for s in range(20)} == {9}
    entropies = []
    for temperature in (0.3, 0.7, 1.0, 2.0):
        p = filtered(LOGITS, Sampling(temperature=temperature)).softmax(-1)
        entropies.append(float(-(p * p.log()).sum()))
    assert entropies == sorted(entropies)
