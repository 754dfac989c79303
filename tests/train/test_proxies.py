"""What each architecture can learn and its counterpart cannot: small plants, each with a control that must fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmctl.nn.config import TRAITS, ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch, Piece, lay_out
from llmctl.train.data import Pick, Source
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM, MaskedLM, Objective, hits, target_logits
from llmctl.train.params import TrainParams

MASK, START = 0, 0
LETTERS = 20
"""Ordinary tokens are 1 to LETTERS."""


class Planted(Source):
    """Sequences that a rule makes; the last tenth of `size` is never trained on."""

    def __init__(self, make: Callable[[np.random.Generator], Piece], causal: bool, params: TrainParams) -> None:
        super().__init__(9000, params)
        self.make, self.causal = make, causal

    def batch(self, picks: Sequence[Pick]) -> Batch:
        pieces = [self.make(np.random.default_rng([7, self.order(epoch)[place]])) for epoch, place in picks]
        return lay_out(pieces, 64, packed=False, causal=self.causal)

    def held_out(self, count: int = 500) -> Batch:
        return lay_out([self.make(np.random.default_rng([8, n])) for n in range(count)], 64, False, self.causal)


def train(
    make_context, config: ModelConfig, objective: Objective, make, steps: int, frozen: Sequence[str] = (), **changes
) -> tuple:
    """(accuracy on held-out sequences, the model, its source); the parameters `frozen` stay as they begin."""
    values = {"batch_size": 64, "max_steps": steps, "embedding_lr": 0.01, "warmup_steps": 10, "threads": 1}
    params = TrainParams(**{**values, "schedule": "wsd", **changes})
    torch.manual_seed(changes.get("seed", 0))
    model = Transformer(config)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    source = Planted(make, config.traits.kind != "encoder", params)
    fit(make_context("-".join([config.traits.kind, *frozen])), model, objective, source, params)
    return accuracy(model, source.held_out()), model, source


def accuracy(model: Transformer, batch: Batch) -> float:
    with torch.no_grad():
        return float(hits(target_logits(model, batch), batch.targets)) / len(batch.targets)


def palindrome(rng: np.random.Generator) -> Piece:
    """a b c d d c b a with one of the first four hidden: only what stands to its right tells it."""
    half = rng.integers(1, LETTERS + 1, 4)
    ids = np.concatenate([half, half[::-1]])
    place = int(rng.integers(4))
    read = ids.copy()
    read[place] = MASK
    return Piece(read, np.array([place]), ids[[place]])


def encoder(kind: str) -> ModelConfig:
    """A small BERT, or its twin that looks back only."""
    traits = replace(TRAITS["bert"], kind=kind)
    return ModelConfig(arch="bert", traits=traits, vocab_size=LETTERS + 1, dim=64, layers=2, heads=4, context=64)


@pytest.mark.slow
def test_only_an_encoder_fills_in_a_palindrome(make_context) -> None:
    both, _, _ = train(make_context, encoder("encoder"), MaskedLM(), palindrome, 300)
    back, _, _ = train(make_context, encoder("decoder"), MaskedLM(), palindrome, 300)
    print("infill: both sides", both, "back only", back)
    assert both > 0.98
    assert back < 2 / LETTERS  # chance is 1 / LETTERS


CLASSES = np.random.default_rng(3).permutation(240).reshape(8, 30)
"""Tokens of each class: nothing but what follows a token tells its class."""
TURN = 0.9


def turning(rng: np.random.Generator) -> Piece:
    """Tokens of any class; after one of class k comes one of class k + 1 in nine cases of ten, else one of any."""
    kinds = [int(rng.integers(8))]
    for _ in range(16):
        kinds.append((kinds[-1] + 1) % 8 if rng.random() < TURN else int(rng.integers(8)))
    ids = np.array([CLASSES[kind, rng.integers(30)] for kind in kinds])
    return Piece(ids[:-1], np.arange(16), ids[1:])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_frozen_embeddings_end_with_a_higher_loss(make_context, seed: int) -> None:
    """In 8 dimensions the blocks and the head alone do not tell 240 random vectors apart as fast."""
    config = ModelConfig(
        arch="llama", vocab_size=240, dim=8, layers=1, heads=2, kv_heads=2, ff_dim=16, context=32, tie_embeddings=False
    )
    losses = {}
    for name, frozen in (("trained", ()), ("frozen", ("embedding.weight",))):
        _, model, source = train(make_context, config, CausalLM(), turning, 200, frozen, seed=seed)
        batch = source.held_out()
        with torch.no_grad():
            total, _ = CausalLM().loss(model, batch)
        losses[name] = float(total) / len(batch.targets)
    likely = TURN + (1 - TURN) / 8
    entropy = np.log(30) - likely * np.log(likely) - (1 - likely) * np.log((1 - likely) / 7)
    print("nats: entropy", entropy, losses, "guess", np.log(240))
    assert abs(losses["trained"] - entropy) < 0.05  # what there is to learn is learnt
    assert losses["frozen"] > losses["trained"] + 0.5


def reversal(rng: np.random.Generator) -> Piece:
    """The source backwards."""
    ids = rng.integers(1, LETTERS + 1, 8)
    target = ids[::-1].copy()
    return Piece(np.concatenate([[START], target[:-1]]), np.arange(8), target, source=ids)


@pytest.mark.slow
def test_an_encoder_decoder_reverses_and_without_cross_attention_guesses(make_context) -> None:
    config = ModelConfig(arch="t5", vocab_size=LETTERS + 1, dim=64, layers=2, heads=4, context=64, pad_id=0)
    found, model, source = train(make_context, config, CausalLM(), reversal, 450)
    with torch.no_grad():
        for block in model.blocks:
            block.cross.out.weight.zero_()
    blind = accuracy(model, source.held_out())
    print("reversal:", found, "without cross-attention", blind)
    assert found > 0.98
    assert blind < 2 / LETTERS
