"""Beam searches among the rows of an engine: which slot each beam goes on in, and the scores of what was found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmctl.engine import TokenScores
from llmctl.generator import Candidate
from llmctl.ort.sampling import rank
from llmctl.ort.slots import Slots
from llmctl.ort.tasks import Lane, Task


def advance(task: Task, logits: np.ndarray, slots: Slots) -> bool:
    """Advance all beams of a request from their `logits (B, V)`, in the order of `task.beams`; whether they go on."""
    search, old = task.search, task.beams
    assert search is not None
    states = [lane.state for lane in old] if old[0].state.adjusts else []
    top = task.request.logprobs or 0
    parents = search.step(rank(logits, search.totals, search.wanted, states, top))
    if not parents:
        return False
    new = _spread(task, parents, slots)
    if states:
        copies = [old[parent].state.copy() for parent in parents]
        for lane, one, token in zip(new, copies, search.tokens, strict=True):
            one.accept(token)
            lane.state = one
    for lane in task.lanes:
        lane.token = None
    for lane, token in zip(new, search.tokens, strict=True):
        lane.token = token
    task.beams = new
    return True


def _spread(task: Task, parents: Sequence[int], slots: Slots) -> list[Lane]:
    """The lanes of the new beams, each holding what its parent held.

    A beam that goes on keeps its slot for the first of its continuations; the others take slots of dead beams.
    """
    old = task.beams
    staying: dict[int, int] = {}
    for place, parent in enumerate(parents):
        staying.setdefault(parent, place)
    spare = [lane for lane in task.lanes if lane not in [old[parent] for parent in staying]]
    new: list[Lane] = []
    for place, parent in enumerate(parents):
        lane = old[parent]
        if staying[parent] != place:
            lane, source = spare.pop(), old[parent].slot
            start = len(task.prompt) if lane.shares else 0
            slots.copy(source, lane.slot, int(slots.lengths[source]), start)
            lane.shares = True
        new.append(lane)
    return new


def found_answers(task: Task) -> list[Candidate | None]:
    """The best answers of a search that has ended, as many as were asked for; None where no further one exists."""
    assert task.search is not None
    wanted = task.request.sampling.n
    found: list[Candidate | None] = [*task.search.finished[:wanted]]
    return found + [None] * (wanted - len(found))


def score_answer(task: Task, answer: Candidate) -> tuple[TokenScores, ...]:
    """The scores of an answer that a search has found, its end's too, if asked for: the beam kept them as it grew."""
    if task.request.logprobs is None:
        return ()
    tokens = answer.ids if answer.end is None else [*answer.ids, answer.end]
    tops = answer.tops or [()] * len(tokens)
    return tuple(TokenScores(*found) for found in zip(tokens, answer.logprobs, tops, strict=True))
