"""Who has which slot, and what is remembered of those who had it before."""

from __future__ import annotations

import numpy as np

from llmctl.ort.prefixes import Prefix, PrefixPool
from llmctl.ort.slots import Slots
from llmctl.ort.tasks import Lane

WORTH_KEEPING = 16
"""Fewer tokens than these are read again sooner than they are saved."""


class Allocation:
    """The owners of slots. `remembers`: what an owner leaves is kept for prompts that begin alike."""

    def __init__(self, slots: Slots, pool: PrefixPool, *, remembers: bool) -> None:
        self.slots, self.pool, self.remembers = slots, pool, remembers
        self.owners: list[Lane | None] = [None] * slots.count
        self.evictions = 0
        """Sequences that neither a slot nor the pool holds any more."""
        self._used = np.zeros(slots.count, np.int64)
        """When each slot was last taken or left, by the count of such events."""
        self._clock = 0
        self._lanes: list[Lane] | None = None
        """The running lanes by slot; None: somebody came or went."""

    def changed(self) -> None:
        """A lane has begun to run, or has ended."""
        self._lanes = None

    @property
    def running(self) -> int:
        """How many lanes run."""
        return sum(owner is not None and owner.token is not None for owner in self.owners)

    def free(self) -> list[int]:
        """Slots without an owner."""
        return [slot for slot, owner in enumerate(self.owners) if owner is None]

    def _take(self, lane: Lane, slot: int) -> None:
        self.owners[slot], lane.slot = lane, slot
        self.slots.adapters[slot] = lane.task.adapter
        self._touch(slot)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock

    def place(self, lane: Lane, known: np.ndarray) -> int:
        """Take a free slot that holds as much of `known (T,)` as can be found anywhere; how many tokens of it.

        What the slot held otherwise goes to the pool.
        """
        slots, free, adapter = self.slots, self.free(), lane.task.adapter
        siblings = any(other is not lane and other.slot >= 0 for other in lane.task.lanes)
        shared = slots.match(known, adapter) if self.remembers or siblings else np.zeros(slots.count, np.int64)
        pooled, length = self.pool.match(known, adapter) if len(known) else (None, 0)
        source = int(shared.argmax())
        best = max(int(shared[source]), length)
        # A slot of which nothing is lost is taken as it is; then an empty one; then the one that was unused longest.
        slot = min(
            free, key=lambda s: (not 0 < best == shared[s] == slots.lengths[s], slots.lengths[s] > 0, self._used[s])
        )
        if shared[slot] == best:
            self._retire(slot, best)
            slots.lengths[slot] = best
        else:
            self._retire(slot, 0)
            slots.lengths[slot] = 0  # if what follows fails, the slot holds nothing that is known
            if int(shared[source]) == best:
                slots.copy(source, slot, best)
            elif pooled is not None:
                slots.load(slot, pooled.tokens, pooled.values, best)
        self._take(lane, slot)
        if best and self.owners[source] is None and int(shared[source]) == best:
            self._touch(source)
        return best

    def _retire(self, slot: int, kept: int) -> None:
        """All but the first `kept` tokens of a slot are about to be overwritten."""
        slots, length = self.slots, int(self.slots.lengths[slot])
        if length == kept:
            return
        tokens, adapter = slots.contents[slot, :length], int(slots.adapters[slot])
        elsewhere = slots.match(tokens, adapter)
        elsewhere[slot] = 0
        if not self.remembers or elsewhere.max() == length or self.pool.covers(tokens, adapter):
            return
        if length - kept < WORTH_KEEPING or length > self.pool.capacity:
            self.evictions += 1
            return
        self.pool.add(Prefix(tokens.copy(), slots.memory.save(slot, length), adapter))

    def release(self, lane: Lane) -> None:
        """The lane needs its slot no more; what the slot holds stays."""
        self.owners[lane.slot] = None
        self._touch(lane.slot)
        if not self.remembers and not lane.task.pending:
            self.slots.lengths[lane.slot] = 0
        self._lanes = None

    def compact(self) -> list[Lane]:
        """The running lanes, moved to the first slots."""
        if self._lanes is not None:
            return self._lanes
        runs = [owner is not None and owner.token is not None for owner in self.owners]
        count = sum(runs)
        holes = (slot for slot in range(count) if not runs[slot])
        for slot in range(count, len(runs)):
            if runs[slot]:
                self._exchange(slot, next(holes))
        self._lanes = [owner for owner in self.owners[:count] if owner is not None]
        return self._lanes

    def _exchange(self, one: int, other: int) -> None:
        self.slots.exchange(one, other)
        both = [one, other]
        self._used[both] = self._used[both[::-1]]
        self.owners[one], self.owners[other] = self.owners[other], self.owners[one]
        for slot in both:
            owner = self.owners[slot]
            if owner is not None:
                owner.slot = slot
