"""The stopwatch around a constraint: what it notes, by a clock that a test sets, and that it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from llmctl.text.masking import MaskingTime, TimedConstraint


class Slow:
    """Allows everything; each call moves the clock."""

    def __init__(self, clock: list[float], mask: float, accept: float) -> None:
        self.clock, self.costs, self.said = clock, (mask, accept), []

    def mask(self):
        self.clock[0] += self.costs[0]
        return np.ones(4, np.bool_)

    def accept(self, token):
        self.clock[0] += self.costs[1]
        self.said.append(token)

    def copy(self):
        other = Slow(self.clock, *self.costs)
        other.said = list(self.said)
        return other


def test_each_mask_is_noted_with_the_token_followed_before_it():
    clock, spent = [5.0], MaskingTime()
    timed = TimedConstraint(Slow(clock, 0.25, 0.5), spent, lambda: clock[0])
    for token in (1, 2, 3):
        assert timed.mask().all()
        clock[0] += 100  # the model's own time is none of it
        timed.accept(token)
    assert spent.steps == [0.25, 0.75, 0.75]
    assert spent.rest == 0.5
    assert spent.seconds == clock[0] - 305
    assert spent.to_dict() == {"masks": 3, "seconds": 2.25}
    assert spent.line() == "masking 7.5e+02 ms a token"


def test_copies_go_their_own_way_and_share_the_account():
    clock, spent = [0.0], MaskingTime()
    first = TimedConstraint(Slow(clock, 1.0, 2.0), spent, lambda: clock[0])
    first.accept(1)
    second = first.copy()
    second.accept(2)
    first.mask()
    second.mask()
    assert (first._constraint.said, second._constraint.said) == ([1], [1, 2])
    assert spent.seconds == pytest.approx(clock[0])
    assert spent.rest == pytest.approx(0)


def test_a_file_of_answers_is_one_account_that_does_not_grow():
    clock, whole = [0.0], MaskingTime()
    for _ in range(100):
        spent = MaskingTime()
        timed = TimedConstraint(Slow(clock, 0.25, 0.5), spent, lambda: clock[0])
        for token in (1, 2, 3):
            timed.mask()
            timed.accept(token)
        whole.add(spent)
    assert (whole.steps, whole.masks) == ([], 300)
    assert whole.seconds == pytest.approx(clock[0])
    assert whole.to_dict() == {"masks": 300, "seconds": 225.0}
    assert whole.line() == "masking 7.5e+02 ms a token"


def test_nothing_masked_says_nothing():
    assert MaskingTime().line() == ""
