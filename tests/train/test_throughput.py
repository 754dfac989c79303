from __future__ import annotations

import pytest

from llmctl.train.throughput import Throughput, tokens_per_second, utilisation


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_is_exact_with_a_fake_clock() -> None:
    clock = Clock()
    meter = Throughput(clock)
    clock.now += 2
    meter.add(1000)
    assert meter.rate() == meter.overall() == 500  # a start time taken for a duration would give 1000 / 102
    clock.now += 30
    meter.skip()  # validation
    clock.now += 1
    meter.add(1000)
    assert meter.rate() == 1000
    assert meter.overall() == pytest.approx(2000 / 3)
    assert meter.rate() == 0.0


def test_no_time_is_no_rate() -> None:
    assert tokens_per_second(5, 0.0) == 0.0


def test_utilisation() -> None:
    assert utilisation(98.9e12, "NVIDIA H200") == pytest.approx(0.1)
    assert utilisation(36.2e12, "NVIDIA L40S") == pytest.approx(0.1)
    assert utilisation(1e12, "some other device") is None
