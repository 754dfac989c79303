from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import chisquare

from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.ort import sampling as batch
from llmctl.ort.history import adjust
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


def by_transformers(logits: np.ndarray, order: str, t: float, k: int, p: float, m: float = 0.0) -> np.ndarray:
    """The warpers of transformers in the given order; "tkp" is the one it uses itself."""
    import torch
    from transformers.generation import logits_process as lp

    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for step in order:
        warper = {
            "t": lp.TemperatureLogitsWarper,
            "k": lp.TopKLogitsWarper,
            "p": lp.TopPLogitsWarper,
            "m": lp.MinPLogitsWarper,
        }[step]
        scores = warper({"t": t, "k": k, "p": p, "m": m}[step])(None, scores)
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


def test_probabilities_with_min_p_equal_those_of_transformers() -> None:
    for t, k, p, m in ((0.7, 20, 0.9, 0.1), (1.0, 0, 1.0, 0.3), (1.5, 0, 0.8, 0.4), (1.0, 5, 1.0, 1.0)):
        sampling = Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
        for logits in flat_logits():
            order = "t" + "k" * bool(k) + "p" * (p < 1) + "m"
            assert (
                np.abs(distribution(logits, sampling) - by_transformers(logits, order, t, k or 97, p, m)).max() < 1e-9
            )
    # Before the temperature it would keep another set.
    wrong = [by_transformers(x, "mt", 2.0, 97, 1.0, 0.3) for x in flat_logits()]
    right = [distribution(x, Sampling(temperature=2.0, min_p=0.3)) for x in flat_logits()]
    assert sum(np.abs(a - b).max() > 1e-4 for a, b in zip(right, wrong, strict=True)) >= 10


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
        (Sampling(temperature=1.0, top_k=10, seed=4), softmax(LOGITS.astype(np.float64))),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, truth: np.ndarray) -> None:
    sample = Sampler(sampling)
    counts = np.bincount([sample(LOGITS) for _ in range(DRAWS)], minlength=10)
    assert chisquare(counts, truth * DRAWS).pvalue > 0.01


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


# Top-p .5 keeps .28, .2 and .14; .28 * .4 = .112 keeps the same.
@pytest.mark.parametrize(("options", "size"), [({"top_k": 4}, 4), ({"top_p": 0.5}, 3), ({"min_p": 0.4}, 3)])
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


def test_penalties_and_bias_equal_closed_forms_and_leave_the_logits_alone() -> None:
    import torch
    from transformers.generation import logits_process as lp

    random = np.random.default_rng(1)
    prompt, said, size = [3, 3, 5, 8], [5, 7, 7, 7], 12
    logits = random.normal(0, 2, (1, size)).astype(np.float32)
    bias = ((5, 1.5), (0, -2.0))
    sampling = Sampling(
        repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=-0.4, logit_bias=bias, temperature=0.0
    )
    state = batch.state(sampling, prompt, size)
    for token in said:
        state.accept(token)
    scores = lp.SequenceBiasLogitsProcessor({(token,): value for token, value in bias})(
        torch.tensor([prompt + said]), torch.from_numpy(logits.copy())
    )
    expected = lp.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + said]), scores)[0].numpy()
    counts = np.bincount(said, minlength=size)
    expected = expected - 0.3 * counts - -0.4 * (counts > 0)  # OpenAI's formula, over the answer alone
    adjusted = logits.copy()
    adjust(adjusted, [0], [state])
    assert np.abs(adjusted[0] - expected).max() < 1e-6
    kept = logits.copy()
    logits.flags.writeable = False
    assert batch.choose(logits, [state]).tolist() == [expected.argmax()]
    assert (logits == kept).all()
    with pytest.raises(UsageError, match="logit_bias names token 12, the model's vocabulary has 12"):
        batch.state(Sampling(logit_bias=((12, 1.0),)), prompt, 12)


def test_a_frequency_penalty_ends_repetition_and_counts_the_answer_only() -> None:
    flat = np.zeros((1, 5), np.float32)
    flat[0, 2] = 3.0
    state = batch.state(Sampling(frequency_penalty=1.0), [2, 2, 2, 2], 5)
    assert [int(batch.choose(flat, [state])[0]) for _ in range(5)] == [2, 2, 2, 0, 1]


class Only:
    """A constraint: even and odd tokens by turns."""

    def __init__(self, size: int, turn: int = 0) -> None:
        self.size, self.turn = size, turn

    def mask(self) -> np.ndarray:
        return np.arange(self.size) % 2 == self.turn

    def accept(self, token: int) -> None:
        assert token % 2 == self.turn
        self.turn = 1 - self.turn

    def copy(self) -> Only:
        return Only(self.size, self.turn)


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 70, 500]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([(), ((1, 4.0), (2, -100.0))]),
    seed=st.integers(0, 99),
)


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(SAMPLINGS, st.booleans()), min_size=1, max_size=6),
    size=st.sampled_from([8, 97, 400]),
    spread=st.sampled_from([0.0, 0.3, 5.0]),
    seed=st.integers(0, 99),
)
def test_a_row_does_not_depend_on_the_others(rows, size: int, spread: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Rounded, so that there are ties.
    logits = random.normal(0, spread, (4, len(rows), size)).round(1).astype(np.float32)

    def states() -> list[batch.AnswerState]:
        return [batch.state(one, [1, 1, 3], size, Only(size) if forced else None) for one, forced in rows]

    together, alone = states(), states()
    for step in logits:
        found = batch.choose(step, together)
        assert found.dtype == np.int64
        assert found.tolist() == [int(batch.choose(step[row : row + 1], [one])[0]) for row, one in enumerate(alone)]


@settings(max_examples=40)
@given(
    ks=st.lists(st.sampled_from([0, 5, 128, 129, 200, 256, 257, 1000, 2500, 4000]), min_size=2, max_size=6),
    p=st.sampled_from([1.0, 0.9]),
    spread=st.sampled_from([0.0, 0.3, 5.0]),
    seed=st.integers(0, 99),
)
def test_rows_with_large_and_small_top_k_draw_as_alone(ks: list[int], p: float, spread: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, (len(ks), 3000)).round(1).astype(np.float32)
    samplings = [Sampling(temperature=1.0, top_k=k, top_p=p, seed=seed + row) for row, k in enumerate(ks)]
    found = batch.choose(logits, [batch.state(one, [1], 3000) for one in samplings])
    assert found.tolist() == [Sampler(one)(row) for one, row in zip(samplings, logits, strict=True)]


def test_a_large_top_k_makes_no_other_row_sort_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ranked = batch._ranked

    def spy(logits: np.ndarray, width: int):
        asked.append((len(logits), width))
        return ranked(logits, width)

    monkeypatch.setattr(batch, "_ranked", spy)
    ks = [50, 2500, 0, 50, 300, 100]
    logits = np.random.default_rng(0).normal(0, 5, (len(ks), 3000)).astype(np.float32)
    batch.choose(logits, [batch.state(Sampling(temperature=1.0, top_k=k, seed=0), [1], 3000) for k in ks])
    assert sorted(asked) == [(1, 300), (1, 2500), (4, batch.FIRST_POOL)]


@settings(max_examples=60)
@given(sampling=SAMPLINGS, spread=st.sampled_from([0.2, 1.0, 5.0]), seed=st.integers(0, 99))
def test_a_draw_is_that_of_the_whole_sorted_distribution(sampling: Sampling, spread: float, seed: int) -> None:
    """Only the likeliest tokens are sorted at first; the token is the one that sorting all of them gives."""
    logits = np.random.default_rng(seed).normal(0, spread, 3000).astype(np.float32)
    sampling = Sampling(
        temperature=sampling.temperature or 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
    )
    ids, probabilities = candidates(logits, sampling)
    number = np.random.default_rng(sampling.seed).random()
    place = np.searchsorted(np.cumsum(probabilities), number, side="right")
    assert Sampler(sampling)(logits) == ids[min(place, len(ids) - 1)]


def test_a_copy_goes_on_alone_and_a_constraint_that_allows_nothing_is_told() -> None:
    sampling = Sampling(temperature=1.0, seed=3, repetition_penalty=2.0, presence_penalty=1.0)
    state = batch.state(sampling, [1], 10, Only(10))
    logits = LOGITS[None]
    batch.choose(logits, [state])
    other = state.copy()
    ours = [int(batch.choose(logits, [state])[0]) for _ in range(20)]
    assert [int(batch.choose(logits, [other])[0]) for _ in range(20)] == ours
    with pytest.raises(UsageError, match="allows no token"):
        batch.choose(logits, [batch.state(sampling, [1], 10, Only(10, turn=2))])


def test_scores_are_the_models_own() -> None:
    logits = np.stack([LOGITS, LOGITS[::-1]])
    plain = np.log(softmax(logits.astype(np.float64), axis=1))
    found = batch.scores(logits, [0, 1], 3)
    for row, (one, token) in enumerate(zip(found, (0, 1), strict=True)):
        assert one.token == token
        assert one.logprob == pytest.approx(plain[row, token], abs=1e-12)
        assert [id for id, _ in one.top] == np.argsort(-plain[row])[:3].tolist()
        assert [value for _, value in one.top] == pytest.approx(np.sort(plain[row])[::-1][:3], abs=1e-12)
    assert [one.top for one in batch.scores(logits, [0, 1], 0)] == [(), ()]


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"])
@pytest.mark.parametrize("value", [1e39, -1e39, float("inf"), float("nan")])
def test_what_leaves_the_range_of_float32_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: ((2, value),) if name == "logit_bias" else value})


def test_a_penalty_that_makes_logits_infinite_is_refused() -> None:
    with pytest.raises(UsageError, match=r"repetition_penalty must be at least 0\.01, got 1e-50"):
        Sampling(repetition_penalty=1e-50)
    Sampling(repetition_penalty=0.01)
