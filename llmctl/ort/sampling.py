"""How the next token is chosen from logits: one definition, in numpy, for one answer or a batch of them.

The order is that of transformers (`GenerationMixin._get_logits_processor`): logit bias, repetition penalty, the
answer's frequency and presence penalties (OpenAI's, after it as in vLLM), the constraint, the model's rules,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.beams import Continuation, Top
from llmctl.engine import Constraint, TokenScores
from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.ort.history import AnswerState, adjust, state
from llmctl.rules import NOTHING_LEFT, NOTHING_LEFT_HINT

__all__ = ["AnswerState", "candidates", "check_ids", "choose", "log_probabilities", "rank", "scores", "state"]

FIRST_POOL = 128
"""Tokens that are sorted at first; most draws fall among them, and the others are sorted in a second or third try."""
LOWEST = np.finfo(np.float32).min


def check_ids(tokens: Sequence[int], vocab_size: int) -> None:
    """UsageError if an id is outside the vocabulary."""
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        raise UsageError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}",
            hint="was the text encoded with this model's own tokenizer?",
        )


def choose(logits: np.ndarray, states: Sequence[AnswerState], failed: dict[int, Exception] | None = None) -> np.ndarray:
    """The next token of every answer, `(B,)` int64, from `logits (B, V)` float32, which stay as they are.

    The argmax at temperature 0, else a draw. What a row gets does not depend on the other rows. The states move on.
    With `failed` an error of one row, of its constraint for instance, is noted there and concerns no other row; what
    stands in the result for such a row means nothing.
    """
    tokens: np.ndarray
    if all([one.plain for one in states]):
        tokens = logits.argmax(axis=1)
        return tokens
    uniform = np.zeros(len(states))
    for row, one in enumerate(states):
        try:
            if one.sampling.temperature > 0:
                uniform[row] = one.random.random()
        except Exception as error:
            _note(failed, row, error)
    try:
        tokens = _choose(logits, states, uniform)
    except Exception:  # whatever it was, the rows are tried one by one, and whose it is gets it noted
        if failed is None:
            raise
        tokens = _choose_one_by_one(logits, states, uniform, failed)
    for row, one in enumerate(states):
        if one.adjusts and not (failed and row in failed):
            try:
                one.accept(int(tokens[row]))
            except Exception as error:
                _note(failed, row, error)
    return tokens


def _note(failed: dict[int, Exception] | None, row: int, error: Exception) -> None:
    """Raise where nobody wants to know of it otherwise."""
    if failed is None:
        raise error
    failed[row] = error


def _choose_one_by_one(
    logits: np.ndarray, states: Sequence[AnswerState], uniform: np.ndarray, failed: dict[int, Exception]
) -> np.ndarray:
    """As `_choose`, after it has failed: which row it is, and the tokens of the others, with their numbers."""
    tokens = np.full(len(states), -1, np.int64)
    for row in range(len(states)):
        if row not in failed:
            one = slice(row, row + 1)
            try:
                tokens[row] = _choose(logits[one], states[one], uniform[one])[0]
            except Exception as error:
                failed[row] = error
    return tokens


def _choose(logits: np.ndarray, states: Sequence[AnswerState], uniform: np.ndarray) -> np.ndarray:
    """The tokens, where `uniform (B,)` holds each row's random number; the states stay as they are."""
    drawn = [row for row, one in enumerate(states) if one.sampling.temperature > 0]
    adjusted = [row for row, one in enumerate(states) if one.adjusts]
    if adjusted:
        logits = logits.copy()
        adjust(logits, adjusted, [states[row] for row in adjusted])
        for row in adjusted:
            if states[row].rules is not None and np.isneginf(logits[row].max()):
                raise UsageError(NOTHING_LEFT, hint=NOTHING_LEFT_HINT)
    tokens = np.empty(len(states), np.int64)
    if len(drawn) < len(states):
        tokens[:] = logits.argmax(axis=1)
    if drawn:
        some = logits if len(drawn) == len(states) else logits[drawn]
        tokens[drawn] = _draw(some, [states[row].sampling for row in drawn], uniform[drawn])
    return tokens


class Sampler:
    """Chooses one token after another for one answer; equal seeds give equal draws."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        vocab_size: int | None = None,
        constraint: Constraint | None = None,
        eos_ids: frozenset[int] = frozenset(),
        limit: int | None = None,
    ) -> None:
        self.state = state(sampling, prompt, vocab_size, constraint, eos_ids, limit)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token of `logits (V,)`: the argmax at temperature 0, else a draw."""
        if self.state.plain:
            return int(logits.argmax())
        return int(choose(logits[None], [self.state])[0])


def scores(logits: np.ndarray, tokens: Sequence[int], k: int) -> list[TokenScores]:
    """How likely each row of `logits (B, V)` finds its token, and the `k` likeliest tokens; the model's own logits."""
    likely = log_probabilities(logits)
    rows = np.arange(len(logits))
    chosen = likely[rows, np.asarray(tokens, np.int64)].tolist()
    tops = _tops(logits, likely, k)
    return [TokenScores(int(token), value, top) for token, value, top in zip(tokens, chosen, tops, strict=True)]


def _tops(logits: np.ndarray, likely: np.ndarray, k: int) -> list[Top]:
    """The `k` likeliest tokens of each row of `logits (B, V)`, whose log-probabilities are `likely`."""
    if not k:
        return [()] * len(logits)
    best = _ranked(logits, min(k, logits.shape[1])).ids[:, :k]
    values = np.take_along_axis(likely, best, axis=1)
    return [tuple(zip(*row, strict=True)) for row in zip(best.tolist(), values.tolist(), strict=True)]


@dataclass(frozen=True)
class _Pool:
    """The likeliest tokens of each row, best first, and of equal ones the smaller id; `(R, M)`."""

    ids: np.ndarray
    values: np.ndarray
    """Float64; -inf behind a row's last one."""
    sizes: np.ndarray
    """How many each row has, `(R,)`: at least as many as asked for, or all that are above -inf."""
    complete: np.ndarray
    """Whether these are all, `(R,)`."""


def _ranked(logits: np.ndarray, width: int) -> _Pool:
    """The `width` likeliest tokens of each row, and those that equal the last of them: what is in depends on no tie."""
    rows, count = logits.shape
    if width >= count:
        keys = _keys(logits, np.arange(count))
        sizes = np.count_nonzero(logits >= LOWEST, axis=1)
        complete = np.ones(rows, np.bool_)
    else:
        least = np.partition(logits, count - width, axis=1)[:, count - width]
        complete = least < LOWEST
        row, ids = np.nonzero(logits >= np.maximum(least, LOWEST)[:, None])
        sizes = np.bincount(row, minlength=rows)
        keys = np.full((rows, sizes.max()), np.iinfo(np.uint64).max)
        keys[row, np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)] = _keys(logits[row, ids], ids)
    keys.sort(axis=1)
    keys = keys[:, : sizes.max()]
    inside = np.arange(keys.shape[1]) < sizes[:, None]
    ids = np.where(inside, keys & np.uint64(0xFFFFFFFF), 0).astype(np.int64)
    values = np.where(inside, np.take_along_axis(logits, ids, axis=1), -np.inf)
    return _Pool(ids, values.astype(np.float64), sizes, complete)


def _keys(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Numbers that sort as the largest float32 first and, of equal ones, the smaller id; the id is their lower half.

    Sorting whole numbers is several times as fast as a stable sort of indices.
    """
    bits = (values.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    falling = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    return (falling.astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)


@dataclass(frozen=True)
class _Filters:
    """The parameters of several rows, each `(R,)`; without top-k its `k` is the size of the vocabulary."""

    temperature: np.ndarray
    k: np.ndarray
    p: np.ndarray
    min_p: np.ndarray
    free: np.ndarray
    """No top-k: probabilities are those among all tokens."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling], vocab_size: int) -> _Filters:
        k = np.array([one.top_k or vocab_size for one in samplings])
        return cls(
            np.array([one.temperature for one in samplings]),
            k,
            np.array([one.top_p for one in samplings]),
            np.array([one.min_p for one in samplings]),
            k >= vocab_size,
        )

    def __getitem__(self, rows: np.ndarray) -> _Filters:
        return _Filters(self.temperature[rows], self.k[rows], self.p[rows], self.min_p[rows], self.free[rows])


@dataclass(frozen=True)
class _Kept:
    """What the filters leave of a pool. `known` is False for a row that keeps more than its pool holds."""

    cumulated: np.ndarray
    """Sums of unnormalised probabilities, `(R, M)`, likeliest first."""
    counts: np.ndarray
    mass: np.ndarray
    known: np.ndarray


def _weigh(values: np.ndarray, best: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """Probabilities relative to that of the likeliest, `(…, M)` float64."""
    with np.errstate(over="ignore"):  # a temperature near 0 takes all but the best to -inf, which is right
        return np.exp((values - best) / temperature)  # type: ignore[no-any-return]


def _filter(logits: np.ndarray, pool: _Pool, filters: _Filters) -> _Kept:
    """Top-k (Fan et al. 1805.04833), the smallest set whose mass reaches p, the token that crosses it included
    (Holtzman et al. 1904.09751), and min-p (Nguyen et al. 2407.01082): each keeps a beginning of the sorted pool.

    Sums depend on the row alone, never on how long the pool is: that is why they are not taken over it where all
    tokens count.
    """
    rows = np.arange(len(logits))
    best = pool.values[:, :1]
    weights = _weigh(pool.values, best, filters.temperature[:, None])
    cumulated = np.cumsum(weights, axis=1)
    counts = np.minimum(filters.k, pool.sizes)
    total = cumulated[rows, counts - 1]
    for row in np.flatnonzero(filters.free & ((filters.p < 1) | (filters.min_p == 0))):
        total[row] = _weigh(logits[row].astype(np.float64), best[row], filters.temperature[row]).sum()
    known = ~filters.free | pool.complete
    uncut = filters.free & (filters.p == 1) & (filters.min_p == 0)
    if (filters.p < 1).any():
        limit = np.where(filters.p < 1, filters.p * total, np.inf)
        inside = np.count_nonzero(cumulated - weights < limit[:, None], axis=1)
        known |= inside < pool.sizes
        counts = np.minimum(counts, np.maximum(inside, 1))
    if (filters.min_p > 0).any():
        inside = np.count_nonzero(weights >= filters.min_p[:, None], axis=1)
        known |= inside < pool.sizes
        counts = np.minimum(counts, inside)
    mass = np.where(uncut, total, cumulated[rows, counts - 1])
    return _Kept(cumulated, counts, mass, known)


def _draw(logits: np.ndarray, samplings: Sequence[Sampling], uniform: np.ndarray) -> np.ndarray:
    """One token for each row: the first whose cumulated probability, likeliest first, is above the row's number.

    Rows with a `top_k` of another magnitude are drawn apart: what one of them sorts costs no other row.
    """
    filters = _Filters.of(samplings, logits.shape[1])
    widths = np.where(filters.free, FIRST_POOL, np.maximum(filters.k, FIRST_POOL))
    magnitudes = np.ceil(np.log2(widths))
    if (magnitudes == magnitudes[0]).all():
        return _draw_alike(logits, filters, uniform, int(widths.max()))
    result = np.empty(len(logits), np.int64)
    for magnitude in np.unique(magnitudes):
        rows = np.flatnonzero(magnitudes == magnitude)
        result[rows] = _draw_alike(logits[rows], filters[rows], uniform[rows], int(widths[rows].max()))
    return result


def _draw_alike(logits: np.ndarray, filters: _Filters, uniform: np.ndarray, width: int) -> np.ndarray:
    """As `_draw`, for rows of which `width` tokens are sorted at first."""
    size = logits.shape[1]
    result = np.empty(len(logits), np.int64)
    left = np.arange(len(logits))
    while True:
        part = logits if len(left) == len(logits) else logits[left]
        pool = _ranked(part, min(width, size))
        kept = _filter(part, pool, filters[left])
        target = uniform[left] * kept.mass
        drawn = np.count_nonzero(kept.cumulated <= target[:, None], axis=1)
        uncut = kept.counts == pool.sizes
        # A sum may end a rounding error below the draw: then it is the last token.
        tokens = pool.ids[np.arange(len(left)), np.minimum(drawn, kept.counts - 1)]
        free = (filters.p[left] == 1) & (filters.min_p[left] == 0)
        done = kept.known | (free & uncut & (drawn < pool.sizes))
        result[left[done]] = tokens[done]
        left = left[~done]
        if not len(left):
            return result
        width = width * 16 if width < 1024 else size


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, likeliest first, and their probabilities (float64, summing to 1).

    `logits (V,)`, already adjusted; `sampling.temperature` must be positive.
    """
    pool = _ranked(logits[None], len(logits))
    kept = _filter(logits[None], pool, _Filters.of([sampling], len(logits)))
    count = int(kept.counts[0])
    sums = kept.cumulated[0, :count]
    return pool.ids[0, :count], np.diff(sums, prepend=0.0) / sums[-1]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities `(…, V)` float64 of `logits (…, V)`, nothing scaled or filtered."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, initial=-np.inf, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]


def log_probability(logits: np.ndarray, token: int) -> float:
    """That of `token` under `logits (V,)`."""
    return float(log_probabilities(logits)[token])


def rank(
    logits: np.ndarray, totals: Sequence[float], wanted: int, states: Sequence[AnswerState] = (), top: int = 0
) -> list[Continuation]:
    """The `wanted` likeliest continuations of beams with `logits (B, V)`, `totals` added to each beam's; best first.

    With `states`, one for each beam, bias, penalties, constraints and rules change the log-probabilities that beams are
    ranked by, as in transformers; fewer come back where fewer are allowed, none of a beam that has none. Each brings
    the `top` likeliest tokens in its place.
    """
    likely = log_probabilities(logits)
    scored = likely
    if any(one.adjusts for one in states):
        scored = likely.astype(np.float32)
        adjust(scored, range(len(states)), states, dead_ends=True)
    tops = _tops(logits, likely, top)
    sums = (scored + np.asarray(totals)[:, None]).ravel()
    best = np.argpartition(-sums, min(wanted, sums.size) - 1)[:wanted]
    best = best[np.argsort(-sums[best], kind="stable")]
    best = best[np.isfinite(sums[best])]
    beams, tokens = np.divmod(best, likely.shape[1])
    return [
        Continuation(*found)
        for found in zip(
            beams.tolist(),
            tokens.tolist(),
            likely[beams, tokens].tolist(),
            scored[beams, tokens].tolist(),
            [tops[beam] for beam in beams],
            strict=True,
        )
    ]
