"""Sizes of a mesh: what is refused before anything runs, and plans for more processes than there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from llmctl.errors import MachineError, UsageError
from llmctl.nn.config import ModelConfig
from llmctl.train.fake_ranks import held
from llmctl.train.parallel import ParallelParams
from llmctl.train.params import TrainParams
from llmctl.train.ranks import joined, local_device

CONFIG = ModelConfig(arch="qwen3", vocab_size=512, dim=128, layers=3, heads=8, kv_heads=4, ff_dim=256, context=64)
NORMS = 3 * (2 * 128 + 2 * CONFIG.head_dim) + 128


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 6, "parallel": {"dp_replicate": 2, "dp_shard": 2}}, "batch_size 6 is not divisible by the 4"),
        ({"parallel": {"shard_optimizer": True}}, "shard_optimizer needs dp_replicate above 1"),
        ({"parallel": {"dp_replicate": 2, "dp_shard": 2, "shard_optimizer": True}}, "goes with dp_replicate alone"),
        ({"parallel": {"dp_shard": 2}, "optimizer": "adamw8bit"}, "adamw8bit cannot be parted"),
        ({"parallel": {"dp_shard": 2}, "offload_optimizer": True}, "offload_optimizer is for whole weights"),
        ({"parallel": {"dp_replicate": 2}, "micro_batch": "auto"}, "micro_batch auto is for one process"),
        (
            {
                "parallel": {"dp_replicate": 2, "shard_optimizer": True},
                "optimizer": "schedule-free",
                "schedule": "constant",
            },
            "schedule-free needs all of its state",
        ),
        ({"parallel": {"tp": 2}, "compile": True}, "compile does not go with tp"),
        ({"parallel": {"tp": 2}, "precision": "fp8"}, "precision fp8 does not go with tp"),
        ({"parallel": {"tp": 0}}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_parameters(values, message) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainParams(**values)


def test_no_process_computes_more_at_once_than_its_share() -> None:
    eight = {"dp_shard": 8}
    assert [TrainParams(batch_size=64, micro_batch=n, parallel=eight).sequences_at_once for n in (0, 4, 32)] == [
        8,
        4,
        8,
    ]
    assert TrainParams(batch_size=64).sequences_at_once == 64


def test_the_product_of_the_sizes_is_the_number_of_processes() -> None:
    params = TrainParams(parallel={"dp_replicate": 2, "dp_shard": 4, "tp": 2}, batch_size=8)
    assert (params.processes(), params.parallel.data, params.restarts()) == (16, 8, 3)
    assert TrainParams().processes() == 1
    # Neither is in a key, nor in what a checkpoint must agree with.
    assert params.resume_facts() == TrainParams(batch_size=8).resume_facts()


def test_another_number_of_processes_than_was_started_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with (
        pytest.raises(MachineError, match="parallel asks for 2 processes, 1 were started"),
        joined(ParallelParams(dp_replicate=2), local_device("cpu")),
    ):
        pass


@pytest.mark.parametrize("rank", [0, 63])
def test_a_plan_for_64_processes_needs_none_of_them(rank: int) -> None:
    plan = held(CONFIG, ParallelParams(dp_shard=16, tp=4), rank)
    assert plan.all == CONFIG.parameters()
    # Norms are whole for tensor parallelism; vectors shorter than there are ranks are whole on the first ones.
    matrices = (plan.all - NORMS) // 64
    assert matrices <= plan.own <= matrices + NORMS // 16 + 2 * 3
    assert plan.shapes["blocks.0.attention.q.weight"] == (8 * CONFIG.head_dim // 64, 128)
    assert plan.shapes["blocks.0.attention.out.weight"] == (128 // 16, 8 * CONFIG.head_dim // 4)
    assert plan.shapes["embedding.weight"] == (512 // 64, 128)


@pytest.mark.parametrize("tie", [True, False])
def test_a_plan_for_stages_holds_some_layers_each(tie: bool) -> None:
    config = replace(CONFIG, layers=8, tie_embeddings=tie)
    parallel = ParallelParams(pp=8, dp_replicate=8, cp=2)
    plans = [held(config, parallel, rank) for rank in range(0, 128, 16)]
    blocks = [{name.split(".")[1] for name in plan.shapes if name.startswith("blocks")} for plan in plans]
    assert blocks == [{str(layer)} for layer in range(8)]
    # A tied embedding is at both ends.
    assert sum(plan.own for plan in plans) == config.parameters() + (512 * 128 if tie else 0)


def test_plain_data_parallelism_holds_everything_everywhere() -> None:
    assert held(CONFIG, ParallelParams(dp_replicate=64)).own == CONFIG.parameters()


@pytest.mark.parametrize(
    ("parallel", "config", "message"),
    [
        ({"tp": 8}, CONFIG, "kv_heads 4 cannot be cut into 8 parts"),
        ({"tp": 2}, ModelConfig(arch="t5", vocab_size=64, dim=32, layers=1, heads=2, context=16), "t5 positions"),
    ],
)
def test_a_plan_that_cannot_be_cut_is_refused(parallel, config, message) -> None:
    with pytest.raises(UsageError, match=message):
        held(config, ParallelParams(**parallel))
