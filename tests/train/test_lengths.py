"""How far positions reach: the measure against plain sums, and small models trained at 64 tokens, measured at 256.

The task is to go on with a random string that repeats: after one period every token is known. Each proxy trains for
about half a minute of CPU time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.errors import InputError, UsageError
from llmctl.nn.config import TRAITS, ModelConfig, RopeScaling
from llmctl.nn.inspected import recording
from llmctl.nn.transformer import Transformer
from llmctl.train.lengths import at_length, length_curves, long_rows, loss_by_position, reshaped

TRAINED, REACH = 64, 256


def model_of(positions: str = "rope", **changes: object) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "dim": 64, "layers": 2, "heads": 2, "context": TRAINED, **changes}
    return Transformer(ModelConfig(arch="llama", traits=replace(TRAITS["llama"], positions=positions), **shape)).eval()


def rows_of(length: int, count: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 32, (count, length)))


# -- the measure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 7, 64, 300])
def test_stretches_are_the_plain_means(length):
    model = at_length(model_of(), max(length, TRAINED))
    stretches = loss_by_position(model, rows_of(length))
    assert [part.first for part in stretches] == [1, *(part.last + 1 for part in stretches[:-1])]
    assert stretches[-1].last == length - 1 and len(stretches) <= 33
    tokens = torch.from_numpy(np.stack(rows_of(length)))
    with torch.no_grad():
        losses = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    for part in stretches:
        assert part.nats == pytest.approx(float(losses[:, part.first - 1 : part.last].mean()), abs=1e-5)
        assert part.tokens == 3 * (part.last - part.first + 1)


def test_curves_of_scalings_share_the_weights():
    model = model_of()
    curves = length_curves(model, rows_of(128), ["linear", "yarn"])
    assert [curve.name for curve in curves] == ["as trained", "linear x2", "yarn x2"]
    assert len({curve.beyond for curve in curves}) == 3
    longer = reshaped(model, {"context": 128})
    assert longer.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    within = length_curves(model, rows_of(32))[0]
    assert np.isnan(within.beyond) and within.to_dict()["nats_beyond"] is None


def test_what_cannot_reach_further_is_refused():
    with pytest.raises(UsageError, match="learned positions end at 64, 65 tokens have none"):
        at_length(model_of("learned"), 65)
    with pytest.raises(UsageError, match="rope_scaling has no effect on alibi"):
        at_length(model_of("alibi"), 128, RopeScaling(kind="yarn", factor=2.0, original_context=64))
    assert at_length(model_of("learned"), 64).config.context == 64


def test_rows_are_cut_from_documents_that_are_long_enough():
    documents = [np.arange(5), np.arange(100, 111), np.arange(200, 204)]
    assert [row.tolist() for row in long_rows(documents, 5, 9)] == [
        [0, 1, 2, 3, 4], [100, 101, 102, 103, 104], [105, 106, 107, 108, 109],
    ]  # fmt: skip
    assert len(long_rows(documents, 4, 2)) == 2
    with pytest.raises(InputError, match="no document has 12 tokens, the longest has 11"):
        long_rows(documents, 12, 2)


# -- the proxies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Strings of `low` to `high` random tokens, repeated: what follows is known after one period."""

    vocabulary: int
    low: int
    high: int

    def batch(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens `(count, length)`, and which of all but the first are known from the past."""
        periods = torch.randint(self.low, self.high + 1, (count, 1), generator=generator)
        strings = torch.randint(0, self.vocabulary, (count, self.high), generator=generator)
        where = torch.arange(length)[None]
        return strings.gather(1, where % periods), (where > periods)[:, 1:]

    @torch.no_grad()
    def loss(self, model: Transformer, length: int) -> float:
        """Of known tokens, in the second half of sequences of `length`."""
        tokens, known = self.batch(64, length, torch.Generator().manual_seed(9))
        known[:, : length // 2] = False
        return float(known_loss(model, tokens, known))


FEW = Task(vocabulary=8, low=8, high=16)
"""Few tokens: what comes next is told by several before it."""
MANY = Task(vocabulary=32, low=4, high=16)
"""Many tokens: one before it tells most, which an induction head looks up."""


def known_loss(model: Transformer, tokens: Tensor, known: Tensor) -> Tensor:
    losses = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses[known].mean()


def learn(model: Transformer, task: Task, steps: int, rows: int, length: int, warmup: int = 50) -> Transformer:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / warmup) * max(0.05, 1 - step / steps)
        loss = known_loss(model, *task.batch(rows, length, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_alibi_keeps_its_loss():
    model = learn(model_of("alibi", vocab_size=8, heads=4, context=REACH), FEW, 500, 32, TRAINED)
    trained = FEW.loss(model, TRAINED)
    assert trained < 0.1
    assert max(FEW.loss(model, 128), FEW.loss(model, REACH)) < 1.1 * trained


@pytest.mark.slow
def test_learned_positions_collapse():
    """The control of the others: its table has rows up to REACH, those beyond TRAINED have learned nothing."""
    model = learn(model_of("learned", vocab_size=8, heads=4, context=REACH), FEW, 500, 32, TRAINED)
    trained = FEW.loss(model, TRAINED)
    assert trained < 0.6
    assert min(FEW.loss(model, 128), FEW.loss(model, REACH)) > 2 * trained
    with pytest.raises(UsageError, match="learned positions end at 256"):
        at_length(model, REACH + 1)


@cache
def rotary() -> Transformer:
    """A model that goes on with repeated strings, with rotary positions."""
    return learn(model_of("rope", context=REACH), MANY, 400, 48, TRAINED)


def scaled(kind: str, length: int) -> Transformer:
    scaling = RopeScaling(kind=kind, factor=length / TRAINED, original_context=TRAINED)
    return at_length(rotary(), REACH, scaling)


@pytest.mark.slow
def test_rotary_positions_break_and_recover_when_they_are_scaled():
    trained, beyond, far = (MANY.loss(rotary(), length) for length in (TRAINED, 128, REACH))
    assert trained < 0.3
    assert far > 3 * trained
    # YaRN as it is (2309.00071).
    assert MANY.loss(scaled("yarn", REACH), REACH) < 0.7 * far
    # Interpolation needs a few steps at the new length (2306.15595), a quarter of the training here.
    longer = scaled("linear", 128)
    assert MANY.loss(longer, 128) > beyond
    tuned = Transformer(longer.config)
    tuned.load_state_dict(longer.state_dict())
    learn(tuned, MANY, 100, 16, 128, warmup=1)
    assert MANY.loss(tuned, 128) < 0.7 * beyond
    assert MANY.loss(tuned, 128) < 1.2 * trained


def induction(model: Transformer) -> Tensor:
    """How much each head `(layers, heads)` looks at the token behind the last occurrence of the one it stands on."""
    period = 16
    generator = torch.Generator().manual_seed(3)
    tokens = torch.stack([torch.randperm(32, generator=generator)[:period] for _ in range(16)]).repeat(1, 3)
    with torch.no_grad(), recording(model) as record:
        model(tokens)
    at = torch.arange(period, 3 * period)
    return torch.stack([maps[:, :, at, at - period + 1].mean((0, 2)) for maps in record.maps["decoder"].own])


@pytest.mark.slow
def test_a_trained_model_shows_an_induction_head():
    found, control = induction(rotary()), induction(model_of("rope", context=REACH))
    assert found[1].max() > 0.5
    assert found[0].max() < 0.2  # the first layer cannot: it knows of no token what stood before it
    assert control.max() < 0.1


def accuracy_in_order(blind: bool) -> float:
    """How often an encoder names the token to its left, after 200 steps; `blind`: all position ids are 0."""
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "dim": 48, "layers": 2, "heads": 4, "context": 32}
    model = Transformer(ModelConfig(arch="llama", traits=replace(TRAITS["llama"], kind="encoder"), **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)

    def answers(rows: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 16, (rows, 10), generator=generator)
        logits = model(tokens, positions=torch.zeros_like(tokens) if blind else None)
        return logits[:, 1:].flatten(0, 1), tokens[:, :-1].flatten()

    for step in range(200):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * max(0.05, 1 - step / 200)
        loss = F.cross_entropy(*answers(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits, expected = answers(256)
    return float((logits.argmax(-1) == expected).float().mean())


@pytest.mark.slow
def test_rotary_positions_tell_the_order_and_position_zero_everywhere_does_not():
    assert accuracy_in_order(blind=False) > 0.95
    # What is left is to guess among the tokens that are there.
    assert accuracy_in_order(blind=True) < 0.4
