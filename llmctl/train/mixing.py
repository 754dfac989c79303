"""Several sources as one: which of them each sequence comes from is a function of its number and the seed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, lcm
from typing import Any

import numpy as np

from llmctl.errors import UsageError
from llmctl.train.batches import Batch, Ints
from llmctl.train.data import JoinedSource
from llmctl.train.layout import IN_ORDER
from llmctl.train.params import TrainParams

PERIOD = 128
"""Sequences that are shuffled among the sources: each has its share of so many, to within one."""
MIX = 5
"""Sets these random numbers apart from those that order the data."""


@dataclass(frozen=True)
class _Phase:
    """Sequences from `start` on, drawn by `shares` until one of the sources has no more."""

    start: int
    shares: tuple[int, ...]
    before: tuple[int, ...]
    """Sequences of each source before `start`."""
    length: int | None

    def counts(self, number: int) -> list[int]:
        """How the first `number` sequences are split: whole numbers that add up, and never fall as `number` grows."""
        found, rest, left = [], number, sum(self.shares)
        for share in self.shares:
            mine = rest * share // left if share else 0
            found.append(mine)
            rest, left = rest - mine, left - share
        return found


class Plan:
    """Which source each sequence comes from, and which of that source's it is.

    `shares` are of sequences; a source of which `limits` sequences are taken leaves the rest to the others. Every
    `cycle` sequences are shuffled among themselves. Memory depends on the number of sources alone.
    """

    def __init__(
        self, shares: Sequence[Fraction], limits: Sequence[int | None], seed: int, cycle: int = 1 << 40
    ) -> None:
        scale = lcm(*(share.denominator for share in shares))
        self._cycle = cycle
        self._seed, self._phases = seed, list(_phases([int(share * scale) for share in shares], limits))
        self._starts = [phase.start for phase in self._phases]
        last = self._phases[-1]
        self.total = None if last.length is None else last.start + last.length
        """All sequences there are; None without an end."""
        self._period = lru_cache(maxsize=16)(self._draw)

    def at(self, number: int) -> tuple[int, int]:
        """(source, which of its sequences) of sequence `number`, below `total`."""
        index = bisect_right(self._starts, number) - 1
        within = number - self._starts[index]
        cycle = within // self._cycle * self._cycle
        start = cycle + (within - cycle) // PERIOD * PERIOD
        sources, members = self._period(index, start, min(start + PERIOD, cycle + self._cycle))
        return int(sources[within - start]), int(members[within - start])

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` sequences, up to the end of a period, come from each source."""
        phase = self._phases[bisect_right(self._starts, number) - 1]
        return [a + b for a, b in zip(phase.before, phase.counts(number - phase.start), strict=True)]

    def _draw(self, index: int, start: int, end: int) -> tuple[Ints, Ints]:
        phase = self._phases[index]
        lower = np.array(phase.counts(start))
        upper = np.array(phase.counts(end if phase.length is None else min(end, phase.length)))
        sources = np.repeat(np.arange(len(lower)), upper - lower)
        np.random.default_rng([self._seed, MIX, phase.start + start]).shuffle(sources)
        members = np.zeros(len(sources), np.int64)
        for source, (first, last) in enumerate(zip(lower.tolist(), upper.tolist(), strict=True)):
            members[sources == source] = phase.before[source] + np.arange(first, last)
        return sources, members


def _phases(shares: list[int], limits: Sequence[int | None]) -> list[_Phase]:
    found: list[_Phase] = []
    start, before = 0, [0] * len(shares)
    while any(shares):
        phase = _Phase(start, tuple(shares), tuple(before), None)
        left = [None if limit is None else limit - used for limit, used in zip(limits, before, strict=True)]
        length = _longest(phase, left)
        found.append(_Phase(start, tuple(shares), tuple(before), length))
        if length is None:
            break
        start += length
        before = [a + b for a, b in zip(before, phase.counts(length), strict=True)]
        shares = [0 if limits[i] == before[i] else share for i, share in enumerate(shares)]
    return found


def _longest(phase: _Phase, left: Sequence[int | None]) -> int | None:
    """The most sequences that no source lacks: with one more, one that is used up would have to give another."""
    if all(rest is None for rest, share in zip(left, phase.shares, strict=True) if share):
        return None

    def fits(number: int) -> bool:
        counts = phase.counts(number)
        return all(rest is None or count <= rest for count, rest in zip(counts, left, strict=True))

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _pass(whole: int, total: int | None, batch_size: int) -> int:
    """Sequences of one pass; UsageError if the limits do not allow a single step."""
    if total is None:
        return whole
    if total < batch_size:
        raise UsageError(
            f"the limits of the mixture allow {total} sequences, a step takes {batch_size}",
            hint="raise mixture.epochs, or set batch_size lower",
        )
    return min(whole, total // batch_size * batch_size)


class MixedSource(JoinedSource):
    """Sources of one kind, each with its share of the tokens that are learned from.

    One pass is as many sequences as all of them have: in natural proportions (no `weights`, `alpha` 1) each once; or
    as many whole steps as the limits allow, if those are fewer. `weights` are shares of tokens; without them these are
    the natural ones to the power of `alpha`. `epochs` limit how often each source is passed through; what a source no
    longer gives, the others give in their proportions.
    """

    def __init__(
        self,
        sources: Sequence[JoinedSource],
        params: TrainParams,
        weights: Sequence[float] = (),
        epochs: Sequence[float | None] = (),
        alpha: float = 1.0,
    ) -> None:
        self.sources = sources
        volumes = [source.volume() for source in sources]
        wanted = [Fraction(weight) for weight in weights] or [Fraction(volume**alpha) for volume in volumes]
        shares = [
            weight * source.size / volume if weights or alpha != 1 else Fraction(source.size)
            for weight, source, volume in zip(wanted, sources, volumes, strict=True)
        ]
        most = epochs or [None] * len(sources)
        limits = [
            None if passes is None else ceil(passes * source.size) for passes, source in zip(most, sources, strict=True)
        ]
        self._ends = np.cumsum([source.size for source in sources])
        whole = int(self._ends[-1])
        self.plan = Plan(shares, limits, params.seed, cycle=whole)
        super().__init__(_pass(whole, self.plan.total, params.batch_size), params)
        steps = params.max_steps or max(1, ceil(params.epochs * self.steps_per_epoch))
        if self.plan.total is not None and steps * self.batch_size > self.plan.total:
            raise UsageError(
                f"{steps} steps need {steps * self.batch_size} sequences, "
                f"the limits of the mixture allow {self.plan.total}",
                hint="raise mixture.epochs, or train for fewer steps (max_steps, epochs)",
            )

    def item(self, epoch: int, place: int) -> Any:
        """A sequence of the source whose turn it is; unshuffled, the sources follow one another."""
        if epoch == IN_ORDER:
            source = int(np.searchsorted(self._ends, place, side="right"))
            return self.sources[source].item(IN_ORDER, place - int(self._ends[source]) + self.sources[source].size)
        source, number = self.plan.at(epoch * self.size + place)
        return self.sources[source].item(*divmod(number, self.sources[source].size))

    def join(self, items: Sequence[Any]) -> Batch:
        """Sequences of any of the sources."""
        return self.sources[0].join(items)

    def heaviest(self) -> Batch:
        """The largest that one of the sources can give."""
        found = []
        for source in self.sources:
            source.at_once = self.at_once
            found.append(source.heaviest())
        return max(found, key=lambda batch: batch.size)

    def lengths(self) -> Ints:
        """Of all sources, one after the other."""
        return np.concatenate([source.lengths() for source in self.sources])

    def volume(self) -> int:
        """Tokens of all sources together."""
        return sum(source.volume() for source in self.sources)

    def passes(self, steps: int) -> list[float]:
        """How often each source has been passed through after `steps`."""
        counts = self.plan.counts(steps * self.batch_size)
        return [count / source.size for count, source in zip(counts, self.sources, strict=True)]

    def token_shares(self, steps: int) -> list[float]:
        """Each source's share of the tokens after `steps`."""
        used = [passes * source.volume() for passes, source in zip(self.passes(steps), self.sources, strict=True)]
        return [part / sum(used) for part in used]
