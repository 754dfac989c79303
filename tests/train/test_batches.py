from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from llmctl.errors import InputError
from llmctl.train.batches import Batch, Example, pack
from llmctl.train.data import ExampleSource, TokenSource
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams


def loss_and_gradients(model, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    weight = sum(CausalLM().weight(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        loss, _ = CausalLM().loss(model, batch)
        (loss / weight).backward()
        total += float(loss.detach()) / weight
    return total, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_packed_loss_and_gradient_equal_one_sequence_at_a_time(make_model, make_examples, arch: str) -> None:
    model, examples = make_model(arch=arch, kv_heads=4), make_examples(24)
    packed = pack(examples, 32)
    assert packed.documents is not None and packed.tokens.shape[0] < len(examples)
    # The reference is made by hand: full rows, torch's own cross-entropy with ignored targets.
    model.zero_grad()
    total = 0.0
    weight = sum(example.supervised for example in examples)
    for example in examples:
        targets = torch.tensor(np.where(example.mask, example.ids, -100)[None, 1:])
        logits = model(torch.tensor(example.ids[None, :-1]))
        loss = F.cross_entropy(logits[0], targets[0], reduction="sum", ignore_index=-100) / weight
        loss.backward()
        total += float(loss.detach())
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for batches in ([packed], [pack(examples, 32, packed=False)], [pack(examples[:5], 32), pack(examples[5:], 32)]):
        loss, gradients = loss_and_gradients(model, batches)
        assert loss == pytest.approx(total, abs=1e-6)
        assert max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True)) <= 1e-6
    # Control: without the document ids a sequence sees what was packed before it.
    leaking = Batch(packed.tokens, packed.picks, packed.targets, size=packed.size)
    assert abs(loss_and_gradients(model, [leaking])[0] - total) > 1e-4


def test_mean_of_micro_batch_means_is_another_loss(make_model, make_examples) -> None:
    """The control of the global normaliser: with uneven lengths the usual mistake is visible."""
    model, examples = make_model(), make_examples(12)
    whole, _ = loss_and_gradients(model, [pack(examples, 32)])
    means = [loss_and_gradients(model, [pack(part, 32)])[0] for part in (examples[:2], examples[2:])]
    assert abs(sum(means) / 2 - whole) > 1e-4


def test_changing_one_sequence_leaves_its_neighbours_bit_identical(make_model, make_examples) -> None:
    model, examples = make_model(), make_examples(6, longest=12)
    other = [Example((e.ids + 1) % 48, e.mask) if i == 2 else e for i, e in enumerate(examples)]
    found = []
    for rows in (examples, other):
        batch = pack(rows, 32)
        hidden = model.hidden(batch.tokens, positions=batch.positions, documents=batch.documents)
        found.append((hidden[batch.documents != 2], hidden[batch.documents == 2]))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_targets_are_the_supervised_tokens_and_know_their_sequence(make_examples) -> None:
    examples = make_examples(9)
    for batch in (pack(examples, 32), pack(examples, 32, packed=False)):
        for index, example in enumerate(examples):
            mine = batch.targets[batch.owners == index].tolist()
            assert mine == example.ids[1:][example.mask[1:]].tolist()
            where = batch.picks[batch.owners == index]
            before = batch.tokens.flatten()[where].tolist()
            assert before == example.ids[:-1][example.mask[1:]].tolist()
        assert batch.size == sum(len(example) - 1 for example in examples)


DOCUMENTS = [
    [0, *np.random.default_rng(n).integers(3, 48, size).tolist(), 1]
    for n, size in enumerate([3, 70, 1, 0, 31, 32, 33, 200, 5, 5, 64])
]


def covered(source: TokenSource, epoch: int) -> list[tuple[int, int, int]]:
    """(position in its document, the token read, the target), sorted, of one whole epoch."""
    found = []
    for place in range(source.size):
        batch = source.batch([(epoch, place)])
        tokens = batch.tokens.flatten()
        assert len(tokens) <= source.context
        found += zip(tokens[batch.picks].tolist(), batch.targets.tolist(), strict=True)
    return sorted(found)


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_every_token_but_a_documents_first_is_a_target_once_per_epoch(make_split, packing: str) -> None:
    source = TokenSource(make_split(DOCUMENTS), 32, TrainParams(packing=packing, batch_size=4))
    expected = sorted(pair for ids in DOCUMENTS for pair in zip(ids, ids[1:], strict=False))
    for epoch in (-1, 0, 1):
        assert covered(source, epoch) == expected


def test_no_row_predicts_across_documents_and_positions_restart(make_split) -> None:
    source = TokenSource(make_split(DOCUMENTS), 32, TrainParams(batch_size=4))
    batch = source.batch([(0, place) for place in range(source.size)])
    assert batch.documents is not None and batch.positions is not None
    eos = batch.tokens.flatten()[batch.picks] == 1
    assert not eos.any()  # after the end of a document nothing is predicted
    new = batch.documents[:, 1:] != batch.documents[:, :-1]
    assert (batch.positions[:, 1:][new] == 0).all() and (batch.positions[:, 0] == 0).all()
    assert (
        (batch.positions[:, 1:][~new] == batch.positions[:, :-1][~new] + 1)
        .logical_or(batch.documents[:, 1:][~new] == -1)
        .all()
    )


def test_batches_are_a_function_of_seed_and_step(make_split) -> None:
    split = make_split(DOCUMENTS)
    params = TrainParams(batch_size=4, seed=3)
    one, other = TokenSource(split, 32, params), TokenSource(split, 32, params)
    for step in range(9):  # the other source is only ever asked for step 8, in the third epoch
        last = one.micro_batches(step)
    again = other.micro_batches(8)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(last, again, strict=True))
    seeded = TokenSource(split, 32, params.model_copy(update={"seed": 4})).micro_batches(8)
    assert not torch.equal(seeded[0].tokens, last[0].tokens)
    orders = [one.order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(one.size)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_micro_batches_hold_the_same_sequences_as_the_whole_batch(make_examples) -> None:
    examples = make_examples(10)
    whole = ExampleSource(examples, 32, TrainParams(batch_size=7))
    split = ExampleSource(examples, 32, TrainParams(batch_size=7, micro_batch=3))
    for step in range(3):
        parts = split.micro_batches(step)
        assert len(parts) == 3
        joined = torch.cat([part.targets for part in parts])
        assert torch.equal(joined, whole.micro_batches(step)[0].targets)


def test_a_sweep_is_one_pass_in_order_or_evenly_spread(make_examples) -> None:
    examples = make_examples(10)
    source = ExampleSource(examples, 32, TrainParams(batch_size=2))
    swept = torch.cat([batch.targets for batch in source.sweep()])
    assert torch.equal(swept, torch.cat([pack([example], 32).targets for example in examples]))
    few = list(source.sweep(2))
    assert torch.equal(few[0].targets, pack(examples[:2], 32).targets)
    assert torch.equal(few[1].targets, pack(examples[8:], 32).targets)


def test_nothing_to_train_on_is_refused(make_split) -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        ExampleSource([], 32, TrainParams())
    with pytest.raises(InputError, match="no document of two tokens"):
        TokenSource(make_split([[1], [2]]), 32, TrainParams())


def test_rows_of_single_documents_need_no_mask(make_split) -> None:
    source = TokenSource(make_split([[1] * 320]), 32, TrainParams(batch_size=4))
    batch = source.batch([(0, 1), (0, 2)])
    assert batch.documents is None and batch.positions is None and len(batch.targets) >= 63
