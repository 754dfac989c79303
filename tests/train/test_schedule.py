from __future__ import annotations

import pytest
import torch

from llmctl.train.schedule import lr_factor


def peer_curve(total: int, warmup: int, make, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=warmup, **options)
    values = []
    for _ in range(total):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant", "inverse-sqrt"])
def test_after_warm_up_equals_transformers(name: str) -> None:
    from transformers import optimization as peer

    total, warmup = 40, 7
    makers = {
        "cosine": (peer.get_cosine_with_min_lr_schedule_with_warmup, {"num_training_steps": total, "min_lr_rate": 0.1}),
        "linear": (peer.get_linear_schedule_with_warmup, {"num_training_steps": total}),
        "wsd": (
            peer.get_wsd_schedule,
            {"num_training_steps": total, "num_decay_steps": 20, "min_lr_ratio": 0.1, "decay_type": "linear"},
        ),
        "constant": (peer.get_constant_schedule_with_warmup, {}),
        "inverse-sqrt": (peer.get_inverse_sqrt_schedule, {}),
    }
    maker, options = makers[name]
    theirs = peer_curve(total, warmup, maker, **options)
    least = 0.0 if name in ("linear", "constant", "inverse-sqrt") else 0.1
    ours = [lr_factor(s, total=total, warmup=warmup, schedule=name, min_ratio=least) for s in range(total)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)


def test_warm_up_rises_from_the_first_step_and_never_exceeds_the_run() -> None:
    assert [lr_factor(s, total=100, warmup=4, schedule="cosine") for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [lr_factor(s, total=2, warmup=10, schedule="cosine") for s in range(2)] == [0.5, 1.0]


def test_every_schedule_is_positive_at_the_last_step_and_at_its_floor_after() -> None:
    for name in ("cosine", "linear", "wsd"):
        assert lr_factor(99, total=100, warmup=5, schedule=name) > 0
        assert lr_factor(100, total=100, warmup=5, schedule=name, min_ratio=0.2) == pytest.approx(0.2)
    assert lr_factor(50, total=100, warmup=5, schedule="wsd", decay_share=0.1) == 1.0


def test_inverse_square_root_looks_at_no_end_and_keeps_above_its_floor() -> None:
    short, long = ([lr_factor(s, total=t, warmup=4, schedule="inverse-sqrt") for s in range(20)] for t in (20, 2000))
    assert short == long and short[16] == 0.5
    assert lr_factor(16, total=20, warmup=4, schedule="inverse-sqrt", min_ratio=0.6) == 0.6
    # Without a warm-up as transformers has it: from 1, on a scale of 10000 steps.
    assert lr_factor(0, total=20, warmup=0, schedule="inverse-sqrt") == 1.0
    assert lr_factor(30_000, total=20, warmup=0, schedule="inverse-sqrt") == 0.5


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="unknown schedule"):
        lr_factor(5, total=10, warmup=0, schedule="step")
