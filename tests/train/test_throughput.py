from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmctl.train.throughput import Throughput, flops_per_token, tokens_per_second, utilisation


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


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_flops_equal_torchs_counter(make_model, arch: str) -> None:
    model = make_model(arch=arch, kv_heads=4)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    # The math backend: its attention products are counted, on CPU the fused one's are not.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert flops_per_token(model.config, 16) * tokens.numel() == counter.get_total_flops()


def test_utilisation() -> None:
    assert utilisation(98.9e12, "NVIDIA H200") == pytest.approx(0.1)
    assert utilisation(36.2e12, "NVIDIA L40S") == pytest.approx(0.1)
    assert utilisation(1e12, "some other device") is None
