"""Batches made ahead: the same ones, in bounds, with the errors they raise, and a thread that ends."""

from __future__ import annotations

import threading
import time
import traceback

import pytest
import torch

from llmctl.errors import InputError
from llmctl.train.batches import Batch
from llmctl.train.data import ExampleSource
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams
from llmctl.train.prefetch import Prefetch

CPU = torch.device("cpu")


class Counting(ExampleSource):
    """Remembers which steps were made, and fails at one."""

    fails_at = -1

    def micro_batches(self, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        self.made = [*getattr(self, "made", []), step]
        if step == self.fails_at:
            raise InputError("the disk is gone")
        return super().micro_batches(step, rank, ranks)


@pytest.fixture
def source(make_examples) -> Counting:
    return Counting(make_examples(30), 32, TrainParams(batch_size=6, micro_batch=4))


BEFORE: set[threading.Thread] = set()
"""Of other tests, which drive a run by hand and leave its thread waiting."""


@pytest.fixture(autouse=True)
def others() -> None:
    BEFORE.update(threading.enumerate())


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread not in BEFORE]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_they_are_the_batches_of_the_source(source, ahead: int) -> None:
    prefetch = Prefetch(source, ahead, CPU, 1, 2)
    for step in (0, 1, 2, 3, 9, 10, 4):  # jumps begin anew
        found, expected = prefetch.take(step), ExampleSource.micro_batches(source, step, 1, 2)
        assert len(found) == len(expected)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, expected, strict=True))
    prefetch.close()
    assert not threads()


def test_no_more_are_made_than_asked_for(source) -> None:
    prefetch = Prefetch(source, 2, CPU)
    prefetch.take(5)
    deadline = time.monotonic() + 5
    while len(source.made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert source.made == [5, 6, 7]
    prefetch.close()
    prefetch.close()


def test_an_error_comes_at_its_step_as_what_it_is(source) -> None:
    source.fails_at = 2
    prefetch = Prefetch(source, 3, CPU)
    prefetch.take(0), prefetch.take(1)
    with pytest.raises(InputError, match="the disk is gone") as error:
        prefetch.take(2)
    assert any(frame.name == "micro_batches" for frame in traceback.extract_tb(error.value.__traceback__))
    assert not threads()


def test_training_is_the_same_and_leaves_no_thread(make_model, make_context, source) -> None:
    found = []
    for ahead in (0, 2):
        values = TrainParams(max_steps=4, batch_size=6, micro_batch=4, prefetch=ahead, threads=1)
        model = make_model()
        fit(make_context(f"run{ahead}"), model, CausalLM(), source, values)
        found.append(model.state_dict())
        assert not threads()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    source.fails_at = 2
    with pytest.raises(InputError, match="the disk is gone"):
        fit(make_context("failing"), make_model(), CausalLM(), source, values)
    assert not threads()
