"""Sequences cut across ranks give the logits and gradients of whole ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.errors import UsageError
from llmctl.nn.config import TRAITS, ModelConfig, RopeScaling
from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.context_parallel import places, require_cut, share
from llmctl.train.objectives import CausalLM, MaskedLM

Case = dict[str, Any]
Launch = Callable[[list[Case], int], Path]
SHAPES: dict[str, Case] = {
    "llama": {"kv_heads": 2},
    "window": {"arch": "mistral", "window": 5},
    "learned": {"arch": "gpt2"},
    "alibi": {"arch": "bloom"},
    "distances": {"arch": "gopher"},
    "t5 table": {"arch": "lamda"},
    "values": {"arch": "speedrun", "value_pattern": "-V", "tie_embeddings": False},
    "soft cap": {"arch": "gemma2", "attention_softcap": 5.0, "pattern": "LS", "window": 7},
}
PIECES = [
    *({"name": f"{name} packed", "piece": "cut", "shape": shape, "together": True} for name, shape in SHAPES.items()),
    *({"name": name, "piece": "cut", "shape": SHAPES[name], "together": False} for name in ("llama", "window")),
    {"name": "prefix", "piece": "cut", "shape": {}, "together": False, "prefix": True},
]
PARAMS = {"micro_batch": 4, "epsilon": 1e-5}
LOOP: list[Case] = [
    {"name": "cp", "params": {**PARAMS, "parallel": {"cp": 2}}},
    {"name": "recomputed", "params": {**PARAMS, "parallel": {"cp": 2}, "recompute": "full"}},
    {"name": "unsummed", "params": {**PARAMS, "parallel": {"cp": 2}}, "fault": "gradients of keys are not added up"},
]


@pytest.fixture(scope="module")
def alone(launch_ranks: Launch) -> Path:
    return launch_ranks([{"name": "plain", "params": PARAMS}], 1)


@pytest.fixture(scope="module")
def two(launch_ranks: Launch) -> Path:
    return launch_ranks([*PIECES, *LOOP], 2)


def weights(out: Path, name: str) -> torch.Tensor:
    return torch.cat([value.flatten() for value in torch.load(out / name / "weights.pt").values()])


@pytest.mark.parametrize("name", [piece["name"] for piece in PIECES])
def test_logits_and_gradients_are_those_of_whole_sequences(two: Path, name: str) -> None:
    for rank in (0, 1):
        found = json.loads((two / f"{name}-{rank}.json").read_text())
        # float64, but for the norms of Gemma, which are float32 whatever the model is.
        bound = 1e-7 if "soft cap" in name else 1e-12
        assert found["logits"] <= bound and found["gradient"] <= bound


def test_weights_after_five_clipped_steps_are_those_of_one_process(alone: Path, two: Path) -> None:
    for name in ("cp", "recomputed"):
        assert (weights(two, name) - weights(alone, "plain")).abs().max() <= 1e-5
    assert (weights(two, "unsummed") - weights(alone, "plain")).abs().max() > 1e-4


@pytest.mark.slow
def test_products_with_data_and_tensor_parallelism_equal_one_process(alone: Path, launch_ranks: Launch) -> None:
    meshes = {"dp": {"dp_replicate": 2, "cp": 2}, "shard": {"dp_shard": 2, "cp": 2}, "tp": {"tp": 2, "cp": 2}}
    found = launch_ranks([{"name": n, "params": {**PARAMS, "parallel": mesh}} for n, mesh in meshes.items()], 4)
    apart = {name: float((weights(found, name) - weights(alone, "plain")).abs().max()) for name in meshes}
    assert max(apart.values()) <= 1e-5, apart


def test_shares_are_a_piece_from_the_front_and_its_mirror_image() -> None:
    assert [places(8, rank, 2).tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    tokens = torch.arange(14).reshape(2, 7)  # padded to 8
    batch = Batch(tokens, torch.arange(14), tokens.flatten() + 100, owners=torch.arange(14) // 7, size=13)
    shares = [share(batch, rank, 2) for rank in (0, 1)]
    assert shares[0].tokens.tolist() == [[0, 1, 6, 0], [7, 8, 13, 0]]
    assert shares[0].positions is not None and shares[0].positions.tolist() == [[0, 1, 6, 0]] * 2
    for part in shares:
        assert (part.tokens.flatten()[part.picks] + 100 == part.targets).all()
    assert sorted(torch.cat([part.targets for part in shares]).tolist()) == list(range(100, 114))
    assert [part.size for part in shares] == [6, 7]


@pytest.mark.parametrize(
    ("shape", "objective", "reason"),
    [
        ({"arch": "bert"}, MaskedLM(), "of the kind encoder cannot be cut"),
        ({"arch": "llama"}, MaskedLM(), "MaskedLM needs whole sequences"),
        (
            {"arch": "llama", "rope_scaling": RopeScaling(kind="dynamic", factor=2.0, original_context=16)},
            CausalLM(),
            "depend on the whole sequence",
        ),
        (
            {"arch": "speedrun", "traits": replace(TRAITS["speedrun"], smear=True)},
            CausalLM(),
            "look at the token before",
        ),
    ],
)
def test_what_needs_whole_sequences_is_refused(shape: Case, objective: Any, reason: str) -> None:
    config = ModelConfig(vocab_size=50, dim=32, layers=1, heads=4, context=32, **shape)
    with pytest.raises(UsageError, match=reason):
        require_cut(Transformer(config), objective)
