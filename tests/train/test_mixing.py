"""Mixtures: shares of tokens, passes, proportions; order by seed and number alone."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmctl.errors import UsageError
from llmctl.text.shards import SplitTokens
from llmctl.train.data import TokenSource
from llmctl.train.mixing import MixedSource, Plan
from llmctl.train.params import TrainParams

SHARES = st.lists(st.integers(1, 50), min_size=1, max_size=5)


def source_of(first: int, documents: int, params: TrainParams, longest: int = 40, context: int = 16) -> TokenSource:
    """Tokens from `first` on, each another one, so that a target names its source."""
    lengths = np.random.default_rng(first).integers(2, longest, documents)
    tokens = first + np.arange(lengths.sum(), dtype=np.uint32)
    return TokenSource(SplitTokens("train", tokens, np.cumsum([0, *lengths]).astype(np.uint64), 1), context, params)


def mixture(
    weights=(), epochs=(), alpha=1.0, sizes=(60, 400), longest=(40, 40), epochs_of_all=1, **changes
) -> MixedSource:
    values = {"batch_size": 8, "max_steps": 1, "packing": "best-fit", "epochs": epochs_of_all, **changes}
    params = TrainParams(**values)
    sources = [
        source_of(1_000_000 * number, size, params, long)
        for number, (size, long) in enumerate(zip(sizes, longest, strict=True))
    ]
    return MixedSource(sources, params, weights, epochs, alpha)


def token_shares(source: MixedSource, steps: int) -> list[float]:
    """Counted in the batches themselves."""
    found: Counter[int] = Counter()
    for step in range(steps):
        for batch in source.micro_batches(step):
            found.update((batch.targets // 1_000_000).tolist())
    return [found[number] / found.total() for number in range(len(source.sources))]


@given(SHARES, st.integers(0, 5000), st.integers(0, 3))
def test_every_member_of_a_source_comes_in_its_turn(shares, number, seed) -> None:
    """Against a plain count of everything before."""
    plan = Plan([Fraction(share, 7) for share in shares], [None] * len(shares), seed)
    start = max(0, number - 300)
    begun = Counter({source: count for source, count in enumerate(plan.counts(start - start % 128))})
    for each in range(start - start % 128, number + 1):
        source, member = plan.at(each)
        assert member == begun[source]
        begun[source] += 1
    fresh = Plan([Fraction(share) for share in shares], [None] * len(shares), seed)
    assert fresh.at(number) == plan.at(number)  # whatever was asked for before, and in whatever unit
    for share, count in zip(shares, plan.counts(number - number % 128), strict=True):
        assert abs(count - share / sum(shares) * (number - number % 128)) <= len(shares)


@given(SHARES, st.data())
def test_limits_are_reached_exactly_and_the_others_go_on(shares, data) -> None:
    limits = [data.draw(st.one_of(st.none(), st.integers(1, 400))) for _ in shares]
    plan = Plan([Fraction(share) for share in shares], limits, 0)
    count = plan.total if plan.total is not None else 3000
    found = Counter(plan.at(number) for number in range(count))
    assert max(found.values()) == 1  # nothing twice
    taken = Counter(source for source, _ in found)
    assert all(set(range(taken[source])) == {m for s, m in found if s == source} for source in taken)
    for source, limit in enumerate(limits):
        assert limit is None or taken[source] <= limit
    if plan.total is not None:
        assert [taken[source] for source in range(len(shares))] == limits


def test_natural_proportions_pass_through_everything_once() -> None:
    source = mixture()
    epoch = [
        target for step in range(source.size // 8) for b in source.micro_batches(step) for target in b.targets.tolist()
    ]
    rest = source.batch([(0, place) for place in range(source.size // 8 * 8, source.size)]).targets.tolist()
    found = sorted(epoch + rest)
    assert len(set(found)) == len(found) == sum(part.rows.count.targets for part in source.sources)
    assert source.plan.counts(source.size) == [part.size for part in source.sources]


@pytest.mark.parametrize("packing", ["documents", "best-fit", "crop", "none"])
def test_the_realised_mix_is_within_one_percent_of_the_weights(packing: str) -> None:
    # The second source has short documents: with `none` its rows hold far fewer tokens.
    source = mixture(weights=(7, 3), longest=(40, 10), packing=packing)
    found = token_shares(source, 300)
    assert found[0] == pytest.approx(0.7, abs=0.01) and found[1] == pytest.approx(0.3, abs=0.01)
    assert source.token_shares(300) == pytest.approx(found, abs=0.01)
    passes = source.passes(300)
    assert passes[0] > 3 * passes[1]
    # Control: natural proportions miss it.
    assert abs(token_shares(mixture(longest=(40, 10), packing=packing), 300)[0] - 0.7) > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_is_the_power_of_the_sizes(alpha: float) -> None:
    source = mixture(alpha=alpha, sizes=(40, 300, 900), longest=(40, 40, 40))
    powers = np.array([part.rows.count.targets for part in source.sources]) ** alpha
    assert token_shares(source, 150) == pytest.approx((powers / powers.sum()).tolist(), abs=0.01)


def test_the_order_is_a_function_of_seed_and_step_alone() -> None:
    whole = mixture(weights=(1, 2), seed=3)
    parts = mixture(weights=(1, 2), seed=3, micro_batch=3)
    for step in (40, 2, 17):  # across passes of the small source, in any order
        split = [batch for rank in range(3) for batch in parts.micro_batches(step, rank, 3)]
        expected = whole.micro_batches(step)[0]
        assert torch.equal(torch.cat([batch.tokens for batch in split]), expected.tokens)
    other = mixture(weights=(1, 2), seed=4).micro_batches(2)[0]
    assert not torch.equal(other.tokens, whole.micro_batches(2)[0].tokens)


def test_limits_of_passes() -> None:
    source = mixture(weights=(1, 1), epochs=(2, None), max_steps=100)
    assert source.passes(100)[0] == pytest.approx(2) and source.passes(20)[0] < 2
    short = mixture(weights=(1, 1), epochs=(1, 1), max_steps=None)  # one pass, in whole steps
    assert short.plan.total == sum(part.size for part in short.sources) and short.plan.total % 8
    assert short.size == short.plan.total // 8 * 8
    with pytest.raises(UsageError, match="the limits of the mixture allow 2 sequences, a step takes 8"):
        mixture(weights=(1, 1), epochs=(1e-9, 1e-9))
    with pytest.raises(UsageError, match=r"steps need .* sequences, the limits"):
        mixture(weights=(1, 1), epochs=(1, 1), max_steps=None, epochs_of_all=2)
    with pytest.raises(UsageError, match="1000 steps need 8000 sequences, the limits of the mixture allow"):
        mixture(weights=(1, 1), epochs=(1, 1), max_steps=1000)


def test_a_sweep_goes_through_the_sources_one_by_one() -> None:
    source = mixture()
    swept = torch.cat([batch.targets for batch in source.sweep()])
    each = torch.cat([batch.targets for part in source.sources for batch in part.sweep()])
    assert torch.equal(swept, each)
    assert len(source.heaviest().tokens) == 8
