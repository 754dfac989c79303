from __future__ import annotations

import numpy as np
import pytest

from llmctl.errors import UsageError
from llmctl.train.corruption import corrupt, corrupted_lengths, noise_counts, noise_mask, raw_length, restore

SENTINELS = list(range(32099, 31999, -1))


def published_lengths(tokens: int, density: float, mean_span: float) -> tuple[int, int]:
    """As T5's paper and code state it: noise n = round(d L), spans round(n / m), a sentinel for each, and EOS."""
    noise = int(round(tokens * density))
    spans = int(round(noise / mean_span))
    return tokens - noise + spans + 1, noise + spans + 1


def test_inputs_of_512_need_568_raw_tokens_and_give_targets_of_114() -> None:
    assert raw_length(512, 0.15, 3.0) == 568
    assert corrupted_lengths(568, 0.15, 3.0) == (512, 114)
    assert corrupted_lengths(569, 0.15, 3.0)[0] > 512


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.3, 1.0)])
def test_lengths_follow_the_published_formula(density: float, mean_span: float) -> None:
    for length in range(40, 700, 7):
        assert corrupted_lengths(length, density, mean_span) == published_lengths(length, density, mean_span)


def test_sentinels_descend_and_rebuild_the_text_exactly() -> None:
    rng = np.random.default_rng(0)
    for length in (2, 3, 10, 114, 568):
        ids = rng.integers(0, 30000, length)
        noise = noise_mask(length, 0.15, 3.0, rng)
        source, target = corrupt(ids, noise, SENTINELS)
        assert (len(source) + 1, len(target) + 1) == corrupted_lengths(length, 0.15, 3.0)
        spans = noise_counts(length, 0.15, 3.0)[1]
        assert [token for token in source if token > 30000] == SENTINELS[:spans]
        assert [token for token in target if token > 30000] == SENTINELS[:spans]
        assert restore(source.tolist(), target.tolist(), SENTINELS) == ids.tolist()
        # The control: the sentinels' order matters.
        if spans > 1:
            swapped = [SENTINELS[1] if t == SENTINELS[0] else SENTINELS[0] if t == SENTINELS[1] else t for t in target]
            assert restore(source.tolist(), swapped, SENTINELS) != ids.tolist()


def test_noise_has_the_density_and_the_mean_span_and_reaches_every_place() -> None:
    masks = np.stack([noise_mask(568, 0.15, 3.0, np.random.default_rng(seed)) for seed in range(400)])
    assert (masks.sum(axis=1) == 85).all()
    starts = (np.diff(masks.astype(int), axis=1, prepend=0) == 1).sum(axis=1)
    assert (starts == 28).all()  # mean span 85 / 28 = 3.04
    assert not masks[:, 0].any() and masks[:, -1].all()  # a gap first, a span last
    assert masks[:, 1:-1].any(axis=0).all()


def test_a_worked_example() -> None:
    ids = np.array([10, 11, 12, 13, 14, 15, 16])
    noise = np.array([False, False, True, True, False, False, True])
    source, target = corrupt(ids, noise, [99, 98])
    assert source.tolist() == [10, 11, 99, 14, 15, 98]
    assert target.tolist() == [99, 12, 13, 98, 16]
    assert restore([10, 99, 98], [99, 5], [99, 98]) == [10, 5]


def test_too_few_sentinels_and_too_short_a_context_are_refused() -> None:
    with pytest.raises(UsageError, match="2 noise spans, the tokenizer 1 sentinels"):
        corrupt(np.arange(4), np.array([False, True, False, True]), [99])
    with pytest.raises(UsageError, match="too short"):
        raw_length(2, 0.15, 3.0)
