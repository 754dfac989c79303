"""Where speculation's proposals come from: the text itself, or a small model.

A drafter proposes how a lane's text may go on. It may be wrong at no other price than time: the engine takes only what
the model says itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llmctl.errors import UsageError
from llmctl.generator import Generator
from llmctl.ort.cache import Layout
from llmctl.ort.slots import Slots
from llmctl.ort.tasks import Lane

LATE = 8
"""A draft model that is more tokens than these behind a lane reads them before it proposes anything."""
LONGEST_NGRAM = 3
"""Tokens that must recur at most for what followed them to be proposed; fewer if so many do not recur."""


class Drafter(Protocol):
    """Proposes tokens for lanes."""

    memory_bytes: int
    """Most bytes that it holds for all lanes."""

    def begin(self) -> None:
        """A step begins."""

    def plan(self, lane: Lane, most: int) -> int:
        """How many tokens `propose` would give, as far as that can be told for next to nothing."""

    def propose(self, lane: Lane, most: int) -> list[int]:
        """Up to `most` tokens that may follow the lane's text."""

    def judged(self, lane: Lane, accepted: int) -> None:
        """The first `accepted` of what was proposed last were right; the lane's text has not been told yet."""

    def forget(self, lane: Lane) -> None:
        """The lane has ended."""

    def close(self) -> None:
        """Give the memory back."""


class NgramIndex:
    """Where in a growing text each run of one to `LONGEST_NGRAM` tokens occurred last.

    A token costs `LONGEST_NGRAM` entries of a dictionary when it comes, and a look-up as many; nothing is scanned.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Position behind the last occurrence; that which ends the text is not among them, as nothing follows it."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with `tokens`."""
        text, after = self.text, self._after
        for token in tokens:
            end = len(text)
            for length in range(1, min(LONGEST_NGRAM, end) + 1):
                after[tuple(text[end - length :])] = end
            text.append(token)

    def continuation(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest end of the text when it occurred before; [] if none did.

        Where the earlier occurrence overlaps the end, the text repeats itself, and so does the continuation.
        """
        text = self.text
        for length in range(min(LONGEST_NGRAM, len(text)), 0, -1):
            start = self._after.get(tuple(text[-length:]))
            if start is not None:
                period = len(text) - start
                return [text[start + i % period] for i in range(most)]
        return []


class PromptLookup:
    """Proposes what followed the same tokens before, in prompt or answer (Saxena, prompt lookup decoding, 2023)."""

    memory_bytes = 0

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids
        self._indices: dict[Lane, tuple[NgramIndex, list[int]]] = {}
        """By lane: its text, and how many tokens of the answer are in it already."""

    def begin(self) -> None:
        """See `Drafter.begin`."""

    def plan(self, lane: Lane, most: int) -> int:
        """See `Drafter.plan`."""
        return len(self.propose(lane, most))

    def propose(self, lane: Lane, most: int) -> list[int]:
        """See `Drafter.propose`."""
        if lane not in self._indices:
            self._indices[lane] = (NgramIndex(), [0])
            self._indices[lane][0].extend(lane.task.prompt.tolist())
        index, told = self._indices[lane]
        index.extend(lane.answer[told[0] :])
        told[0] = len(lane.answer)
        return before_end(index.continuation(most), self.eos_ids)

    def judged(self, lane: Lane, accepted: int) -> None:
        """See `Drafter.judged`: the index holds the lane's own text alone, so nothing is taken back."""

    def forget(self, lane: Lane) -> None:
        """See `Drafter.forget`."""
        self._indices.pop(lane, None)

    def close(self) -> None:
        """See `Drafter.close`."""
        self._indices.clear()


class DraftModel:
    """A small decoder that says greedily how each lane goes on, with a slot of its own for every lane.

    Its slots follow the lanes late: what a lane said since is read before the next proposal. Prompts are read under a
    budget of `chunk` tokens a step for all lanes together, so they delay nobody by more. A slot that its lane has left
    keeps its contents, and a lane whose prompt begins alike goes on from there.
    """

    def __init__(self, draft: Generator | None, vocab_size: int, count: int, context: int, chunk: int) -> None:
        session, layout = _open(draft, vocab_size)
        assert draft is not None
        self.eos_ids = draft.eos_ids
        self.capacity = min(context, draft.context_length)
        self.chunk = self._budget = chunk
        self.slots = Slots(session, layout, count, self.capacity)
        self.memory_bytes = self.slots.memory_bytes
        self._slot_of: dict[Lane, int] = {}

    def begin(self) -> None:
        """See `Drafter.begin`."""
        self._budget = self.chunk

    def plan(self, lane: Lane, most: int) -> int:
        """See `Drafter.plan`: the last token that is proposed is not fed, so one more fits than there is room."""
        return max(0, min(most, self.capacity + 1 - len(lane.task.prompt) - len(lane.answer)))

    def propose(self, lane: Lane, most: int) -> list[int]:
        """See `Drafter.propose`; nothing where so much was missing that reading it is enough for this step."""
        wanted = self.plan(lane, most)
        if not wanted:
            return []
        slot = self._slot_of.get(lane)
        if slot is None:
            slot = self._slot_of[lane] = self._take(lane)
        missing = _rest(lane, int(self.slots.lengths[slot]))
        if len(missing) > LATE:
            part = missing[: self._budget]
            if len(part):
                # One is left to propose from.
                self.slots.feed(slot, part[:-1] if len(part) == len(missing) else part, last=True)
            self._budget -= len(part)
            return []
        logits = self.slots.feed(slot, missing, last=True)
        found: list[int] = []
        while True:
            token = int(logits[-1].argmax())
            if token in self.eos_ids:
                return found
            found.append(token)
            if len(found) == wanted:
                return found
            logits = self.slots.feed(slot, np.array([token], np.int32))

    def judged(self, lane: Lane, accepted: int) -> None:
        """See `Drafter.judged`: keys and values of refused tokens are taken back."""
        slot = self._slot_of.get(lane)
        if slot is not None:
            known = len(lane.task.prompt) + len(lane.answer)
            self.slots.lengths[slot] = min(int(self.slots.lengths[slot]), known + accepted)

    def forget(self, lane: Lane) -> None:
        """See `Drafter.forget`."""
        self._slot_of.pop(lane, None)

    def close(self) -> None:
        """See `Drafter.close`."""
        self._slot_of.clear()
        self.slots.close()

    def _take(self, lane: Lane) -> int:
        """A free slot that begins as much like the lane's prompt as any, cut to what both have in common."""
        taken = set(self._slot_of.values())
        free = [slot for slot in range(self.slots.count) if slot not in taken]
        common = self.slots.match(lane.task.prompt)
        # Of those that have nothing in common, the emptiest: longer ones may serve others.
        slot = min(free, key=lambda s: (-common[s], self.slots.lengths[s]))
        self.slots.lengths[slot] = common[slot]
        return slot


def before_end(tokens: list[int], eos_ids: frozenset[int]) -> list[int]:
    """What stands before the first EOS id: the model needs no proposal to end."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens))]


def _rest(lane: Lane, start: int) -> np.ndarray:
    """The lane's text from position `start` on, int32."""
    prompt = lane.task.prompt
    if start >= len(prompt):
        return np.asarray(lane.answer[start - len(prompt) :], np.int32)
    return np.concatenate([prompt[start:], np.asarray(lane.answer, np.int32)])


def _open(draft: Generator | None, vocab_size: int) -> tuple[object, Layout]:
    """Session and layout of a draft; UsageError for one that cannot propose for a model of `vocab_size`."""
    if draft is None:
        raise UsageError("speculation by a draft model needs one", hint="give `draft`, or use prompt-lookup")
    session, layout = getattr(draft, "session", None), getattr(draft, "layout", None)
    if session is None or layout is None or not getattr(draft, "in_place", False):
        raise UsageError(
            f"the draft model ({draft.backend}) is no decoder with an in-place cache",
            hint="export it with `llmctl export-onnx`",
        )
    if draft.vocab_size != vocab_size:
        raise UsageError(
            f"the draft model's vocabulary has {draft.vocab_size} ids, the model's {vocab_size}",
            hint="use a draft that was trained with the model's own tokenizer",
        )
    return session, layout
