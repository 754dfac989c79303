"""Draws from logits in torch against closed forms, each with a control that fails."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scipy.stats import chisquare  # noqa: E402

from llmctl.generator import Sampling  # noqa: E402
from llmctl.train.sampling import Sampler, filtered, log_probability, rank  # noqa: E402

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5])
P = LOGITS.double().softmax(-1).numpy()
DRAWS = 10_000


def draws(sampling: Sampling) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler(LOGITS) for _ in range(DRAWS)], minlength=len(P))


def only(kept: int, temperature: float = 1.0) -> np.ndarray:
    """The truth: the `kept` likeliest of softmax(logits / T), renormalised."""
    p = (LOGITS.double() / temperature).softmax(-1).numpy() * (np.arange(len(P)) < kept)
    return p / p.sum()


def fits(counts: np.ndarray, truth: np.ndarray) -> bool:
    """No draw outside of the support, and within it what a chi-squared test at .01 accepts."""
    kept = truth > 0
    if counts[~kept].sum():
        return False
    return kept.sum() == 1 or chisquare(counts[kept], truth[kept] * counts.sum()).pvalue > 0.01


CROSSING = int(np.searchsorted(np.cumsum(P), 0.7)) + 1
"""Tokens in the smallest set whose mass reaches .7, the one that crosses it included."""


@pytest.mark.parametrize(
    ("sampling", "truth", "wrong"),
    [
        ({}, only(10), only(10, 0.9)),
        ({"temperature": 0.9}, only(10, 0.9), only(10)),
        ({"temperature": 2.0}, only(10, 2.0), only(10)),
        ({"top_k": 3}, only(3), only(2)),
        ({"top_k": 3}, only(3), only(4)),  # a set one too large
        ({"top_k": 10}, only(10), only(9)),  # k = vocabulary is plain sampling
        ({"top_k": 1}, only(1), only(2)),
        ({"top_p": 0.7}, only(CROSSING), only(CROSSING - 1)),  # the crossing token left out
        ({"top_p": 0.7}, only(CROSSING), only(CROSSING + 1)),
        ({"top_p": 1.0}, only(10), only(9)),
        ({"top_p": 1e-6}, only(1), only(2)),
        ({"temperature": 2.0, "top_k": 4}, only(4, 2.0), only(4)),
    ],
)
def test_draws_follow_the_renormalised_truth_and_nothing_near_it(sampling, truth, wrong):
    counts = draws(Sampling(**{"temperature": 1.0, "seed": 3, **sampling}))
    assert fits(counts, truth)
    assert not fits(counts, wrong)


def test_temperature_zero_is_greedy_and_so_is_its_limit():
    assert Sampler(Sampling(temperature=0.0))(LOGITS) == 0
    assert {Sampler(Sampling(temperature=1e-40, seed=s))(LOGITS.flip(0)) for s in range(20)} == {9}
    entropies = []
    for temperature in (0.3, 0.7, 1.0, 2.0):
        p = filtered(LOGITS, Sampling(temperature=temperature)).softmax(-1)
        entropies.append(float(-(p * p.log()).sum()))
    assert entropies == sorted(entropies)
    assert len(set(entropies)) == 4


def test_log_probabilities_and_ranks_know_no_filter():
    assert [log_probability(LOGITS, i) for i in range(10)] == pytest.approx(np.log(P), abs=1e-6)
    found = rank(torch.stack([LOGITS, LOGITS.flip(0)]), [-0.7, 0.0], 4)
    sums = sorted(((t + np.log(p[i]), b, i) for b, (t, p) in enumerate([(-0.7, P), (0.0, P[::-1])]) for i in range(10)))
    assert [(one.beam, one.token) for one in found] == [(b, i) for _, b, i in sums[::-1][:4]]
    assert [one.logprob for one in found] == pytest.approx([np.log((P, P[::-1])[one.beam][one.token]) for one in found])
    assert len(rank(LOGITS[None], [0.0], 99)) == 10
