"""The answers of an engine: which tokens they go on with, what is told of them, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from llmctl.engine import Event, FinishReason, TokenScores
from llmctl.ort.allocation import Allocation
from llmctl.ort.beam_rows import advance, found_answers, score_answer
from llmctl.ort.sampling import choose
from llmctl.ort.scoring import score_lanes
from llmctl.ort.slots import Slots
from llmctl.ort.speculation import Speculation
from llmctl.ort.tasks import Lane, Task


class Answers:
    """Carries the lanes of an engine on. Whatever one of them fails with ends its own request and no other."""

    def __init__(
        self,
        slots: Slots,
        allocation: Allocation,
        speculation: Speculation | None,
        eos_ids: frozenset[int],
        forget: Callable[[Task], None],
    ) -> None:
        self._slots, self._allocation, self._speculation, self._eos_ids = slots, allocation, speculation, eos_ids
        self._forget = forget
        """Told of a request whose last lane has ended."""
        self.generated = 0
        """Tokens of answers."""

    # -- tokens --------------------------------------------------------------------------------------------------------

    def judge(self, lanes: Sequence[Lane], drafts: Sequence[Sequence[int]], events: list[Event]) -> None:
        """The next tokens of each lane: as much of its draft as is right, and one more."""
        assert self._speculation is not None
        for lane, draft in zip(lanes, drafts, strict=True):
            if lane.done:  # another answer of the request has failed, and the request with it
                continue
            try:
                tokens, scored = self._speculation.judge(lane, draft)
            except Exception as error:  # of the session as in `OrtEngine.step`, or of a constraint as in `draw`
                self._slots.lengths[lane.slot] = 0
                self.fail(lane.task, error, events)
                continue
            self._advance(lane, tokens, scored, events)

    def choose(self, lanes: Sequence[Lane], logits: np.ndarray, events: list[Event]) -> None:
        """The next tokens of `lanes` from `logits (len(lanes), V)`."""
        together = [i for i, lane in enumerate(lanes) if lane.task.search is None]
        if len(together) == len(lanes):
            self.draw(lanes, logits, events)
            return
        if together:
            self.draw([lanes[i] for i in together], logits[together], events)
        at = {id(lane): i for i, lane in enumerate(lanes)}
        searched: set[int] = set()  # a search changes which lanes its beams are in
        for lane in lanes:
            task = lane.task
            if task.search is None or lane.done or task.ticket in searched:
                continue
            searched.add(task.ticket)
            try:
                self.search(task, logits[[at[id(beam)] for beam in task.beams]], events)
            except Exception as error:  # as in `draw`
                self.fail(task, error, events)

    def draw(self, lanes: Sequence[Lane], logits: np.ndarray, events: list[Event]) -> None:
        """One token for each of `lanes`, which belong to no search, from `logits (len(lanes), V)`.

        A constraint is foreign code, and parameters are the client's: what they lead to is their own request's failure.
        """
        failed: dict[int, Exception] = {}
        chosen = choose(logits, [lane.state for lane in lanes], failed).tolist()
        for row, error in failed.items():
            self.fail(lanes[row].task, error, events)
        scored = self._scored(lanes, logits, chosen, events)
        for i, (lane, token) in enumerate(zip(lanes, chosen, strict=True)):
            if not lane.done:
                self._advance(lane, (token,), (scored[i],) if i in scored else (), events)

    def _scored(
        self, lanes: Sequence[Lane], logits: np.ndarray, chosen: Sequence[int], events: list[Event]
    ) -> dict[int, TokenScores]:
        """As `score_lanes`. Where memory ends they are tried one by one, and whose scores fail has failed."""
        try:
            return score_lanes(lanes, logits, chosen)
        except Exception:  # of memory, as in the scheduler's `_decode`; each of those below is told to its own request
            found: dict[int, TokenScores] = {}
            for i, lane in enumerate(lanes):
                try:
                    one = score_lanes(lanes[i : i + 1], logits[i : i + 1], chosen[i : i + 1])
                except Exception as error:
                    self.fail(lane.task, error, events)
                else:
                    found.update((i, scores) for scores in one.values())
            return found

    def _advance(self, lane: Lane, tokens: Sequence[int], scored: Sequence[TokenScores], events: list[Event]) -> None:
        """An answer goes on with `tokens`, up to its end; the last of them is fed by the next step."""
        reason: FinishReason | None = None
        kept = 0
        limit, sampling = lane.task.limit, lane.task.request.sampling
        for token in tokens:
            if token in self._eos_ids:
                reason = "length" if sampling.cuts(lane.said + kept, limit) else "stop"
                break
            kept += 1
            if lane.said + kept == limit:
                reason = "length"
                break
        lane.said += kept
        if self._speculation is not None:
            lane.answer += tokens[:kept]
        self.generated += kept
        if reason is None:
            if lane.token is None:
                self._allocation.changed()
            lane.token = tokens[-1]
        ended = reason is not None and kept < len(tokens)
        shown = tuple(scored[: kept + ended])  # an end has a score too
        events.append(self._event(lane.task, lane.choice, tuple(tokens[:kept]), shown, reason))
        if reason is not None:
            self.end(lane)

    def _event(
        self,
        task: Task,
        choice: int,
        tokens: tuple[int, ...],
        scored: tuple[TokenScores, ...],
        reason: FinishReason | None,
    ) -> Event:
        event = Event(task.ticket, choice, tokens, scored, finish_reason=reason)
        if choice == 0 and task.prompt_scores:
            event = replace(event, prompt_scores=tuple(task.prompt_scores))
            task.prompt_scores = []
        if not task.told:
            event, task.told = replace(event, cached=task.cached), True
        return event

    # -- ends ----------------------------------------------------------------------------------------------------------

    def end(self, lane: Lane) -> None:
        """A lane has ended; what its slot holds stays, for prompts that begin alike."""
        lane.done, lane.token = True, None
        task = lane.task
        if self._speculation is not None:
            self._speculation.forget(lane)
        if lane.slot >= 0:
            self._allocation.release(lane)
        if task.ended:
            self._forget(task)

    def end_all(self, task: Task) -> None:
        """All lanes of a request have ended."""
        for lane in task.lanes:
            if not lane.done:
                self.end(lane)

    def search(self, task: Task, logits: np.ndarray, events: list[Event]) -> None:
        """Advance the beams of a request; when the search ends, all answers come at once."""
        if advance(task, logits, self._slots):
            self._allocation.changed()
            return
        for choice, answer in enumerate(found_answers(task)):
            if choice in task.cancelled:
                continue
            if answer is None:
                events.append(self._event(task, choice, (), (), "stop"))  # fewer answers exist
                continue
            self.generated += len(answer.ids)
            scored = score_answer(task, answer)
            cut = not answer.ended or task.request.sampling.cuts(len(answer.ids), task.limit)
            reason: FinishReason = "length" if cut else "stop"
            events.append(self._event(task, choice, tuple(answer.ids), scored, reason))
        self.end_all(task)

    def fail(self, task: Task, error: Exception, events: list[Event]) -> None:
        """The request has failed, unless it ended before."""
        if not task.ended:
            events.append(Event(task.ticket, error=error))
            self.end_all(task)
