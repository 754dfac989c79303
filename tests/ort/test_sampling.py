from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.ort.sampling import Sampler, candidates, log_probability, rank

LOGITS = np.log(np.array([0.28, 0.2, 0.14, 0.1, 0.08, 0.07, 0.05, 0.04, 0.03, 0.01])).astype(np.float32)[
    [3, 7, 0, 9, 1, 5, 2, 8, 6, 4]
]
DRAWS = 20_000


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    ids, probabilities = candidates(logits, sampling)
    dense = np.zeros(len(logits))
    dense[ids] = probabilities
    return dense


def by_transformers(logits: np.ndarray, order: str, t: float, k: int, p: float) -> np.ndarray:
    """The warpers of transformers in the given order; "tkp" is the one it uses itself."""
    import torch
    from transformers.generation import logits_process as lp

    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for step in order:
        warper = {"t": lp.TemperatureLogitsWarper, "k": lp.TopKLogitsWarper, "p": lp.TopPLogitsWarper}[step]
        scores = warper({"t": t, "k": k, "p": p}[step])(None, scores)
    return torch.softmax(scores, -1)[0].numpy()


def flat_logits() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(0, 1, 97).astype(np.float32) for _ in range(20)]


def test_probabilities_equal_those_of_transformers() -> None:
    for t, k, p in ((0.7, 20, 0.9), (1.0, 0, 0.5), (1.3, 5, 1.0), (1.0, 0, 1.0), (0.3, 97, 0.99), (2.0, 200, 0.1)):
        sampling = Sampling(temperature=t, top_k=k, top_p=p)
        for logits in flat_logits():
            expected = by_transformers(logits, "t" + "k" * bool(k) + "p" * (p < 1), t, k or 97, p)
            assert np.abs(distribution(logits, sampling) - expected).max() < 1e-9


@pytest.mark.parametrize("order", ["tpk", "ptk", "kpt"])
def test_any_other_order_is_noticed(order: str) -> None:
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9)
    wrong = [by_transformers(logits, order, 0.7, 20, 0.9) for logits in flat_logits()]
    off = [np.abs(distribution(x, sampling) - y).max() > 1e-4 for x, y in zip(flat_logits(), wrong, strict=True)]
    assert sum(off) >= 10


def test_the_token_that_crosses_p_is_kept() -> None:
    # .28 + .2 + .14 = .62: the third token crosses .5, so it is in; without it the set would be two.
    assert sorted(candidates(LOGITS, Sampling(temperature=1.0, top_p=0.5))[0]) == [2, 4, 6]
    assert candidates(LOGITS, Sampling(temperature=1.0, top_p=1e-9))[0].tolist() == [2]


@pytest.mark.parametrize(
    ("sampling", "truth"),
    [
        (Sampling(temperature=1.0, seed=1), softmax(LOGITS.astype(np.float64))),
        (Sampling(temperature=1.6, seed=2), softmax(LOGITS.astype(np.float64) / 1.6)),
        (Sampling(temperature=1.0, top_k=4, seed=3), None),
        (Sampling(temperature=1.0, top_k=10, seed=4), softmax(LOGITS.astype(np.float64))),
        (Sampling(temperature=1.0, top_p=0.5, seed=5), None),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, truth: np.ndarray | None) -> None:
    if truth is None:
        best = sampling.top_k or 3  # top-p .5 keeps .28, .2 and .14
        plain = softmax(LOGITS.astype(np.float64))
        truth = np.where(plain >= np.sort(plain)[-best], plain, 0)
        truth /= truth.sum()
    sample = Sampler(sampling)
    counts = np.bincount([sample(LOGITS) for _ in range(DRAWS)], minlength=10)
    support = truth > 0
    assert counts[~support].sum() == 0
    assert chisquare(counts[support], truth[support] * DRAWS).pvalue > 0.01


def test_draws_at_another_temperature_are_noticed() -> None:
    sample = Sampler(Sampling(temperature=0.9, seed=1))
    counts = np.bincount([sample(LOGITS) for _ in range(DRAWS)], minlength=10)
    assert chisquare(counts, softmax(LOGITS.astype(np.float64)) * DRAWS).pvalue < 1e-6


def test_entropy_rises_with_the_temperature() -> None:
    entropies = []
    for temperature in (0.2, 0.5, 1.0, 2.0, 5.0):
        p = distribution(LOGITS, Sampling(temperature=temperature))
        entropies.append(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert entropies == sorted(entropies)
    assert len(set(entropies)) == 5


def test_temperatures_at_and_near_zero_are_greedy() -> None:
    assert Sampler(Sampling(temperature=0.0))(LOGITS) == 2
    assert {Sampler(Sampling(temperature=1e-300, seed=s))(LOGITS) for s in range(20)} == {2}
    with pytest.raises(UsageError, match="temperature must not be negative"):
        Sampling(temperature=-0.1)


def test_equal_seeds_give_equal_draws_and_no_seed_gives_new_ones() -> None:
    def draws(seed: int | None) -> list[int]:
        sample = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sample(LOGITS) for _ in range(50)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(("options", "size"), [({"top_k": 4}, 4), ({"top_p": 0.5}, 3)])
def test_a_set_one_too_large_or_too_small_is_noticed(options: dict[str, float], size: int) -> None:
    sample = Sampler(Sampling(temperature=1.0, seed=3, **options))
    counts = np.bincount([sample(LOGITS) for _ in range(DRAWS)], minlength=10)
    assert np.count_nonzero(counts) == size
    order = np.argsort(-LOGITS)
    for kept in (size - 1, size, size + 1):
        truth = softmax(LOGITS[order[:kept]].astype(np.float64))
        fits = counts[order[:kept]].sum() == DRAWS and chisquare(counts[order[:kept]], truth * DRAWS).pvalue > 0.01
        assert fits == (kept == size)


def test_ranks_are_those_of_the_sums() -> None:
    logits, totals = np.stack([LOGITS, LOGITS[::-1] * 2]), [-0.7, 0.0]
    scores = np.log(softmax(logits.astype(np.float64), axis=1))
    sums = sorted(((totals[b] + scores[b, i], b, i) for b in range(2) for i in range(10)), reverse=True)
    found = rank(logits, totals, 7)
    assert [(one.beam, one.token) for one in found] == [(b, i) for _, b, i in sums[:7]]
    assert [one.logprob for one in found] == pytest.approx([scores[one.beam, one.token] for one in found], abs=1e-12)
    assert [log_probability(logits[0], i) for i in range(10)] == pytest.approx(scores[0], abs=1e-12)
    assert len(rank(logits, totals, 99)) == 20
