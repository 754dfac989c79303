"""How the next token is chosen from logits: one definition, in numpy.

The order is temperature, then top-k, then top-p, as in transformers (`generation/logits_process.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmctl.beams import Continuation
from llmctl.errors import UsageError
from llmctl.generator import Sampling


def check_ids(tokens: Sequence[int], vocab_size: int) -> None:
    """UsageError if an id is outside the vocabulary."""
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        raise UsageError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}",
            hint="was the text encoded with this model's own tokenizer?",
        )


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, likeliest first, and their probabilities (float64, summing to 1).

    `logits (V,)`; `sampling.temperature` must be positive. Top-k keeps the k largest (Fan et al. 1805.04833), top-p the
    smallest set whose mass reaches p, the token that crosses p included (Holtzman et al. 1904.09751).
    """
    count = len(logits)
    ids = np.arange(count)
    if 0 < sampling.top_k < count:
        ids = np.sort(np.argpartition(-logits, sampling.top_k - 1)[: sampling.top_k])
    # Stable, so that among equal logits the smaller id comes first.
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    below = logits[ids].astype(np.float64) - float(logits[ids[0]])
    with np.errstate(over="ignore"):  # a temperature near 0 takes all but the best to -inf, which is right
        weights = np.exp(below / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        kept = max(1, int(np.count_nonzero(before < sampling.top_p)))
        ids, probabilities = ids[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return ids, probabilities


class Sampler:
    """Draws one token after another for one sequence; equal seeds give equal draws."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token of `logits (V,)`: the argmax at temperature 0, else a draw."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = candidates(logits, self.sampling)
        drawn = np.searchsorted(np.cumsum(probabilities), self.random.random(), side="right")
        # The sum may end a rounding error below 1 and below the draw.
        return int(ids[min(int(drawn), len(ids) - 1)])


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities `(…, V)` float64 of `logits (…, V)`, nothing scaled or filtered."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, initial=-np.inf, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]


def log_probability(logits: np.ndarray, token: int) -> float:
    """That of `token` under `logits (V,)`."""
    return float(log_probabilities(logits)[token])


def rank(logits: np.ndarray, totals: Sequence[float], wanted: int) -> list[Continuation]:
    """The `wanted` likeliest continuations of beams with `logits (B, V)`, `totals` added to each beam's; best first."""
    scores = log_probabilities(logits)
    sums = (scores + np.asarray(totals)[:, None]).ravel()
    best = np.argpartition(-sums, min(wanted, sums.size) - 1)[:wanted]
    best = best[np.argsort(-sums[best], kind="stable")]
    beams, tokens = np.divmod(best, scores.shape[1])
    logprobs = scores[beams, tokens]
    return [Continuation(*found) for found in zip(beams.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)]
